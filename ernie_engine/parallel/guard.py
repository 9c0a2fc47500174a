"""A process beside each rank that ends it when it no longer moves: stopped, or stuck so that not
even its threads run. A rank cannot do that for itself.

Run as a script by the rank, which writes to its standard input twice a second. Imports nothing of
the package. Touches its parent only.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress


class Guard:
    """Owned by a rank: call beat() at least every `timeout_seconds`."""

    def __init__(self, timeout_seconds: float):
        command = [sys.executable, "-I", "-S", __file__, str(timeout_seconds), str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)

    def beat(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody has ended the guard: then nothing guards
            self._process.stdin.write(b".")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def watch(timeout_seconds: float, parent: int) -> None:
    """Until the parent closes the pipe, as by ending; kill it after too long a silence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    num_missed = 0
    while num_missed < 2:  # once may be because both were stopped: then it speaks at once
        readable, _, _ = select.select([0], [], [], 1.0 if num_missed else timeout_seconds)
        if readable and not os.read(0, 4096):
            return
        num_missed = 0 if readable else num_missed + 1
    if os.getppid() == parent:
        message = f"ernie_engine: process {parent} has not moved for {timeout_seconds:g} s: killed"
        print(message, file=sys.stderr, flush=True)
        os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    watch(float(sys.argv[1]), int(sys.argv[2]))
