"""How long work takes on a device: the median of some runs, weights never warm in a cache.

Work comes as equal pieces over arguments of their own, so that a run of all of them reads from
memory what a step would, and what a step finds in the cache (activations) may be there. On a GPU
what is timed is the replay of a graph of the pieces: no launch waits for Python, and the replay's
own beginning is shared by all. A twin that waits for the device cannot be captured and is timed as
it runs in an engine. Kernels that may overlap the launch before them do so here, with themselves:
what they load ahead is loaded while the piece before ends.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Work = Callable[[], object]
CACHE_MARGIN = 4  # arguments of all pieces, over the L2 cache
MOST_COPIES = 32
PIECES = 8  # at least so many in a run
WARM_UP_S, BUDGET_S = 0.02, 0.2  # clocks rise with work; long pieces are repeated less often


class Timer(Protocol):
    def copies(self, num_bytes: int) -> int:
        """How many sets of arguments of that size it takes for none to be found in a cache."""
        ...

    def __call__(self, works: Sequence[Work], *, graph: bool) -> float:
        """Seconds for one of them."""
        ...


def make_timer(device: torch.device, repeats: int) -> Timer:
    return _GpuTimer(device, repeats) if device.type == "cuda" else _CpuTimer(repeats)


class _CpuTimer:
    def __init__(self, repeats: int):
        self.repeats = repeats

    def copies(self, num_bytes: int) -> int:
        return 1

    def __call__(self, works: Sequence[Work], *, graph: bool) -> float:
        works[0]()
        return statistics.median(self._time(works[0]) for _ in range(self.repeats))

    def _time(self, work: Work) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


class _GpuTimer:
    def __init__(self, device: torch.device, repeats: int):
        self.repeats = repeats
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def copies(self, num_bytes: int) -> int:
        needed = -(-CACHE_MARGIN * self.cache_bytes // max(1, num_bytes))
        return min(MOST_COPIES, needed)

    def __call__(self, works: Sequence[Work], *, graph: bool) -> float:
        pieces = list(works) * -(-PIECES // len(works))
        for work in works:
            work()
        run = _captured(pieces) if graph else _one_after_the_other(pieces)
        once = self._record(run)
        torch.cuda.synchronize()
        estimate = once[0].elapsed_time(once[1]) / 1e3
        for _ in range(int(WARM_UP_S / estimate)):
            run()
        repeats = max(3, min(self.repeats, int(BUDGET_S / estimate)))
        pairs = [self._record(run) for _ in range(repeats)]
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return statistics.median(times) / len(pieces)

    def _record(self, run: Work) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return begin, end


def _one_after_the_other(works: Sequence[Work]) -> Work:
    def run() -> None:
        for work in works:
            work()

    return run


def _captured(works: Sequence[Work]) -> Work:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay
