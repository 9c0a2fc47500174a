"""Where figures were measured: versions, device, commit, command, date.

Only reads. What cannot be found out is null in the report, never guessed.
"""

import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("ernie-engine", "torch", "triton", "numpy")


def environment() -> dict[str, Any]:
    """For the JSON line of a report."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "device": device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def device_name() -> str:
    """The GPUs' name and number, or the processor and the threads that torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{_processor()} (threads: {torch.get_num_threads()})"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the repository that this file lies in; "-dirty" if what is run differs from it."""
    folder = str(Path(__file__).parent)
    return _output("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None
