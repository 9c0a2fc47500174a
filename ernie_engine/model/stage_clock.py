"""How long a stage has worked: from the moment a step's input is there to its last kernel.

Owns the events of steps that are not done yet. On a GPU it reads finished events only: it never
makes anybody wait.
"""

import threading
import time
from collections import deque

import torch


class StageClock:
    """start() and stop() around each step's work; `busy_seconds` is of the `num_steps` finished
    ones, as of the last look()."""

    def __init__(self, device: torch.device):
        self.busy_seconds, self.num_steps = 0.0, 0
        self._lock = threading.Lock()  # a watcher looks while steps run
        self._on_gpu = device.type == "cuda"
        self._started_at = 0.0
        self._begin: torch.cuda.Event | None = None
        self._unfinished: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        self._started_at = time.perf_counter()
        self._begin = _recorded() if self._on_gpu else None

    def stop(self) -> None:
        if self._begin is None:
            self.busy_seconds += time.perf_counter() - self._started_at
            self.num_steps += 1
        else:
            self._unfinished.append((self._begin, _recorded()))
            self.look()

    def look(self) -> None:
        """Take in the steps that the GPU has finished."""
        with self._lock:
            while self._unfinished and self._unfinished[0][1].query():
                begin, end = self._unfinished.popleft()
                self.busy_seconds += begin.elapsed_time(end) / 1e3
                self.num_steps += 1


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
