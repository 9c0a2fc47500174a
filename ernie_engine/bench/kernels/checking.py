"""Is what a kernel computed right? Compared with its twin, before anything is timed.

A check takes (arguments, what the kernel gave, what the twin gave in fp64, what the twin gave)
and returns None or what is wrong. Never repairs and never rounds away a difference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Check = Callable[[Sequence[Any], Tensors, Tensors, Tensors], str | None]

MARGIN = 1.5  # a kernel may be so much further from fp64 than the twin in the same dtype
# What a perfect kernel may be off by, where the twin happens to be exact: half a unit of the dtype.
UNIT = {torch.float64: 2**-53, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def near(arguments: Sequence[Any], out: Tensors, wide: Tensors, twin: Tensors) -> str | None:
    """Floats: relative RMS error against fp64 within MARGIN of the twin's. Integers: equal."""
    for i, (ours, exact, theirs) in enumerate(zip(out, wide, twin, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {i}: {ours.dtype} {list(ours.shape)}, not {list(theirs.shape)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"output {i}: {int((ours != theirs).sum())} integers differ"
            continue
        error, allowed = relative_error(ours, exact), relative_error(theirs, exact)
        limit = MARGIN * max(allowed, UNIT[ours.dtype] / 2)
        if not error <= limit:  # NaN is wrong too
            return f"output {i}: error {error:.3g}, at most {limit:.3g}"
    return None


def same_bits(arguments: Sequence[Any], out: Tensors, wide: Tensors, twin: Tensors) -> str | None:
    """Every output equal to the twin's."""
    for i, (ours, theirs) in enumerate(zip(out, twin, strict=True)):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            return f"output {i}: not the twin's"
    return None


def relative_error(x: Tensor, exact: Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    difference, size = (x.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / size.clamp(min=1e-300))
