"""The other ranks of an Engine in a plain Python program, as child processes of it.

Owns their start and their end. They are told their configuration through standard input, as
JSON; everything else goes through the control channel.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from ernie_engine.engine_config import EngineConfig

_SOURCES = Path(__file__).parents[2]  # so that a child finds the package as this process did
_MAIN = "from ernie_engine.engine.worker import main; main()"
WAIT_SECONDS = 10.0


class Children:
    """Ranks 1 .. size - 1, running engine/worker.py."""

    def __init__(self, config: EngineConfig, size: int, port: int):
        fields = asdict(config) | {"device": config.device.split(":")[0]}  # each has its own
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN],
                stdin=subprocess.PIPE,
                env=_environment(rank, size, port),
            )
            self._processes[rank] = process
            assert process.stdin is not None
            process.stdin.write(json.dumps(fields).encode())
            process.stdin.close()

    def end_of(self, rank: int) -> str | None:
        """How a rank has ended; None while it runs."""
        status = self._processes[rank].poll()
        if status is None:
            return None
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Until all have ended; those that do not within this time each are killed."""
        for process in self._processes.values():
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // size)
    path = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH")]))
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": path,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
