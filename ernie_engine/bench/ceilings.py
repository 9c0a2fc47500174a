"""What this device reaches at best: bytes a second through memory, operations a second in a
matrix product. Measured, never taken from a data sheet.
"""

import time
from collections.abc import Callable

import torch

from ernie_engine.bench.floors import Ceilings

GPU_BYTES, CPU_BYTES = 1 << 32, 1 << 27  # far more than caches hold
ROW = 8192
GPU_WIDTH, CPU_WIDTH = 8192, 1024
REPEATS = 20


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of a large copy (read and written) and large reads; a square product in `dtype`.

    Takes a second or two, and frees what it allocated.
    """
    on_gpu = device.type == "cuda"
    ceilings = Ceilings(
        _bytes_per_s(device, GPU_BYTES if on_gpu else CPU_BYTES),
        _flops_per_s(device, dtype, GPU_WIDTH if on_gpu else CPU_WIDTH),
    )
    if on_gpu:
        torch.cuda.empty_cache()
    return ceilings


def _bytes_per_s(device: torch.device, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    rows, weights = source.view(-1, ROW), source[:ROW].clone()
    copied = 2 * num_bytes / _best_time(device, lambda: target.copy_(source))
    reads = source.sum, lambda: rows.sum(1), lambda: rows @ weights
    return max(copied, *(num_bytes / _best_time(device, read) for read in reads))


def _flops_per_s(device: torch.device, dtype: torch.dtype, width: int) -> float:
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * width**3 / _best_time(device, lambda: torch.mm(a, b, out=out))


def _best_time(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of some runs, in seconds."""
    timed = _gpu_time if device.type == "cuda" else _cpu_time
    timed(work)
    return min(timed(work) for _ in range(REPEATS))


def _gpu_time(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cpu_time(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
