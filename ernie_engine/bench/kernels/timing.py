"""How long work takes on a device: the median of some runs, each with cold caches.

On a GPU what is timed is the replay of a captured graph, so that no launch waits for Python; a twin
that waits for the device cannot be captured and is timed as it runs in an engine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than any L2 cache holds
WARM_UP = 3


class Timer(Protocol):
    def __call__(self, work: Work, *, graph: bool) -> float:
        """Seconds."""
        ...


def make_timer(device: torch.device, repeats: int) -> Timer:
    return _GpuTimer(device, repeats) if device.type == "cuda" else _CpuTimer(repeats)


class _CpuTimer:
    def __init__(self, repeats: int):
        self.repeats = repeats

    def __call__(self, work: Work, *, graph: bool) -> float:
        work()
        return statistics.median(self._time(work) for _ in range(self.repeats))

    def _time(self, work: Work) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


class _GpuTimer:
    def __init__(self, device: torch.device, repeats: int):
        self.repeats = repeats
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Work, *, graph: bool) -> float:
        for _ in range(WARM_UP):
            work()
        run = _captured(work) if graph else work
        pairs = [self._record(run) for _ in range(self.repeats)]
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def _record(self, run: Work) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()  # meanwhile the launches of `run` are queued
        begin.record()
        run()
        end.record()
        return begin, end


def _captured(work: Work) -> Work:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
