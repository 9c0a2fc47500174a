"""One kernel case: checked against its twin, then timed beside it. What is wrong is not timed.

Owns the order of these and the figures that come of them. How time is taken: timing.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.timing import Timer, Work
from ernie_engine.kernels.registry import IMPLEMENTATIONS

Op = Callable[..., Any]
SEED = 0


@dataclass(frozen=True)
class Measurement:
    """Seconds of the kernel and of the twin, or why there are none."""

    case: KernelCase
    seconds: float | None = None
    twin_seconds: float | None = None
    problem: str | None = None

    def row(self, ceilings: Ceilings) -> dict[str, Any]:
        """For tables and for JSON."""
        case, work = self.case, self.case.work
        row: dict[str, Any] = {"op": case.op, "case": case.label, "num_tokens": case.num_tokens}
        if self.seconds is None or self.twin_seconds is None:
            return {**row, "problem": self.problem}
        return {
            **row,
            "us": self.seconds * 1e6,
            "twin_us": self.twin_seconds * 1e6,
            "speedup": self.twin_seconds / self.seconds,
            "gb_per_s": work.num_bytes / self.seconds / 1e9,
            "tflop_per_s": work.flops / self.seconds / 1e12,
            "bound": work.bound(ceilings),
            "share_of_ceiling": work.seconds(ceilings) / self.seconds,
        }


def measure(
    cases: Iterable[KernelCase], name: str, device: torch.device, timer: Timer
) -> Iterator[Measurement]:
    """Every case with the implementation `name` of its op."""
    for case in cases:
        yield measure_one(case, IMPLEMENTATIONS[case.op][name], device, timer)


def measure_one(case: KernelCase, op: Op, device: torch.device, timer: Timer) -> Measurement:
    twin = IMPLEMENTATIONS[case.op]["torch"]
    arguments = make_arguments(case, device)
    problem = find_problem(case, op, twin, arguments)
    if problem is not None:
        return Measurement(case, problem=f"WRONG, not timed: {problem}")
    sets = [arguments, *more_arguments(case, device, timer, arguments)]
    seconds = timer(pieces(op, sets), graph=op is not twin)
    return Measurement(case, seconds, timer(pieces(twin, sets), graph=False))


def make_arguments(case: KernelCase, device: torch.device, copy: int = 0) -> tuple[Any, ...]:
    torch.manual_seed(SEED + copy)
    return case.make(device)


def more_arguments(
    case: KernelCase, device: torch.device, timer: Timer, arguments: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """Others like `arguments`, as many as the timer wants."""
    num_bytes = sum(a.nbytes for a in arguments if isinstance(a, Tensor))
    return [make_arguments(case, device, copy) for copy in range(1, timer.copies(num_bytes))]


def pieces(op: Op, sets: Sequence[tuple[Any, ...]]) -> list[Work]:
    """What a timer takes: the op with each set of arguments."""
    return [partial(op, *arguments) for arguments in sets]


def find_problem(case: KernelCase, op: Op, twin: Op, arguments: tuple[Any, ...]) -> str | None:
    """What is wrong with op's results, if anything."""
    return make_check(case, twin, arguments)(op)


def make_check(
    case: KernelCase, twin: Op, arguments: tuple[Any, ...]
) -> Callable[[Op], str | None]:
    """The same for many ops: the twin runs once."""

    @cache
    def wide() -> list[Tensor]:
        return _results(case, twin, tuple(map(_widened, arguments)))

    expected = _results(case, twin, arguments)
    return lambda op: case.check(arguments, _results(case, op, arguments), wide, expected)


def _results(case: KernelCase, op: Op, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What op returns and what it writes into copies of its arguments."""
    copies = [a.clone() if i in case.written else a for i, a in enumerate(arguments)]
    returned = op(*copies)
    returned = [returned] if isinstance(returned, Tensor) else list(returned)
    return returned + [copies[i] for i in case.written]


def _widened(argument: Any) -> Any:
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument
