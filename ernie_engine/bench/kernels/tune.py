"""Rows for the launch tables: every candidate that an op names, checked, then timed.

Owns the search and the rows that it prints; never changes a file. A candidate that is wrong or does
not fit the card is told and left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.measure import find_problem, make_arguments
from ernie_engine.bench.kernels.timing import Timer
from ernie_engine.kernels import rms_norm, rope, router, swiglu, top_filter, vocab_head
from ernie_engine.kernels.launch import DEFAULT, architecture
from ernie_engine.kernels.registry import IMPLEMENTATIONS

Params = dict[str, int]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Tunable:
    table: dict[tuple[str, int], Params]
    candidates: Sequence[Params]


TUNABLE = {
    "rms_norm": Tunable(rms_norm.TABLE, rms_norm.CANDIDATES),
    "add_rms_norm": Tunable(rms_norm.TABLE, rms_norm.CANDIDATES),
    "rope_and_cache": Tunable(rope.TABLE, rope.CANDIDATES),
    "swiglu": Tunable(swiglu.TABLE, swiglu.CANDIDATES),
    "router": Tunable(router.TABLE, router.CANDIDATES),
    "sample": Tunable(top_filter.TABLE, top_filter.CANDIDATES),
    "vocab_head": Tunable(vocab_head.TABLE, vocab_head.CANDIDATES),
}


@contextmanager
def only_row(table: dict[tuple[str, int], Params], params: Params) -> Iterator[None]:
    """Every size is launched with `params`."""
    rows = dict(table)
    table.clear()
    table[DEFAULT, 1] = params
    try:
        yield
    finally:
        table.clear()
        table.update(rows)


def tune(
    tunable: Tunable, cases: Iterable[KernelCase], device: torch.device, timer: Timer, tell: Tell
) -> dict[int, tuple[Params, float]]:
    """Size -> the candidate with the least time over the cases of that size, and that time."""
    by_size: dict[int, list[KernelCase]] = {}
    for case in cases:
        by_size.setdefault(case.size, []).append(case)
    best: dict[int, tuple[Params, float]] = {}
    for size, group in sorted(by_size.items()):
        totals = [0.0] * len(tunable.candidates)
        for case in group:
            times = _times(tunable, case, device, timer, tell)
            totals = [total + seconds for total, seconds in zip(totals, times, strict=True)]
        # The least time in all: where two layouts disagree, the larger work decides.
        seconds, place = min((total, i) for i, total in enumerate(totals))
        if seconds < float("inf"):
            best[size] = tunable.candidates[place], seconds
    return best


def _times(
    tunable: Tunable, case: KernelCase, device: torch.device, timer: Timer, tell: Tell
) -> list[float]:
    """Of each candidate; infinite for one that cannot be used."""
    op, twin = (IMPLEMENTATIONS[case.op][name] for name in ("triton", "torch"))
    arguments, times = make_arguments(case, device), []
    for params in tunable.candidates:
        with only_row(tunable.table, params):
            problem = _problem(case, op, twin, arguments)
            usable = problem is None
            times.append(timer(lambda: op(*arguments), graph=True) if usable else float("inf"))
        if problem is not None:
            tell(f"{case.op} {case.label} {case.num_tokens}: {dict(params)} left out: {problem}")
    return times


def _problem(case: KernelCase, op: Any, twin: Any, arguments: tuple[Any, ...]) -> str | None:
    try:
        return find_problem(case, op, twin, arguments)
    except OutOfResources as error:
        return str(error)


def table_rows(device: torch.device, best: Mapping[int, tuple[Params, float]]) -> list[str]:
    """To be pasted; equal neighbours become one bucket, as large as the larger."""
    arch = architecture(device)
    lines: list[tuple[int, Params]] = []
    for size, (params, _) in sorted(best.items()):
        if lines and lines[-1][1] == params:
            lines.pop()
        lines.append((size, params))
    return [f'    ("{arch}", {size}): {_literal(params)},' for size, params in lines]


def _literal(params: Params) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in params.items()) + "}"
