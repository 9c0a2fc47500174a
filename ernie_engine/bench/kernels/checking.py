"""Is what a kernel computed right? Compared with its twin, before anything is timed.

A check takes (arguments, what the kernel gave, a function that gives the twin's in fp64, what the
twin gave) and returns None or what is wrong. Never repairs and never rounds a difference away.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Sequence[Tensor]
Check = Callable[[Sequence[Any], Tensors, Callable[[], Tensors], Tensors], str | None]

MARGIN = 1.5  # a kernel may be so much further from fp64 than the twin in the same dtype
# What a kernel may be off by where the twin happens to be exact: unit roundoff of the half types;
# four of the others, since a sum of theirs in another order is another sum.
FLOOR = {torch.float64: 2**-51, torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BLOCK = 32  # values whose error counts together, so that 1% in one tile is not averaged away


def near(
    arguments: Sequence[Any], out: Tensors, wide: Callable[[], Tensors], twin: Tensors
) -> str | None:
    """Floats: the worst block's error against fp64 within MARGIN of the twin's. Integers: equal."""
    for i, (ours, exact, theirs) in enumerate(zip(out, wide(), twin, strict=True)):
        if problem := near_each(ours, exact, theirs):
            return f"output {i}: {problem}"
    return None


def near_each(ours: Tensor, exact: Tensor, theirs: Tensor) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
    if not ours.is_floating_point():
        differ = int((ours != theirs).sum())
        return f"{differ} integers differ" if differ else None
    error, allowed = worst_error(ours, exact), worst_error(theirs, exact)
    limit = MARGIN * max(allowed, FLOOR[ours.dtype])
    return None if error <= limit else f"error {error:.3g}, at most {limit:.3g}"  # NaN is wrong


def same_bits(
    arguments: Sequence[Any], out: Tensors, wide: Callable[[], Tensors], twin: Tensors
) -> str | None:
    """Every output equal to the twin's."""
    for i, (ours, theirs) in enumerate(zip(out, twin, strict=True)):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            return f"output {i}: not the twin's"
    return None


def worst_error(x: Tensor, exact: Tensor) -> float:
    """The largest RMS error of BLOCK neighbours of a row, relative to the row's RMS."""
    if x.numel() == 0:
        return 0.0
    exact = exact.double().reshape(-1, exact.shape[-1])  # [N, D]
    difference = x.double().reshape(exact.shape) - exact
    size = exact.square().mean(dim=-1).sqrt().clamp(min=1e-300)  # [N]
    blocks = F.pad(difference, (0, -difference.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return float((blocks.square().mean(dim=-1).sqrt() / size[:, None]).max())
