"""Of processes that tests start and end; nothing of the package is needed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def is_alive(pid: int) -> bool:
    """Running, and not only waiting to be noticed by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def without_interpreter(*command: str | Path) -> list[str]:
    """What Python printed, by lines, in a process where kernels are compiled or noted instead of
    interpreted: Triton decides that when a kernel is defined."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
