"""A kernel case: one op at one size, with its arguments, its least work and its comparison.

Owns the type alone. What the cases are: layer.py, attention.py, experts.py, sampling.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.checking import Check, near


@dataclass(frozen=True)
class KernelCase:
    """`make(device)` gives the op's arguments, the same numbers at every call after the same
    seed; on the device "meta" it must work too, so it may not look at a number that it drew.

    `written` are the places of the arguments that the op writes; they are compared like results.
    """

    op: str
    label: str  # what tells it from the op's other cases: "21B tp2 qkv"
    num_tokens: int
    make: Callable[[torch.device], tuple[Any, ...]]
    work: Work = field(repr=False)
    check: Check = near
    written: tuple[int, ...] = ()
