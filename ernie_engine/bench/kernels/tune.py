"""Rows for the launch tables: every candidate that an op names, checked, then timed.

Owns the search and the rows that it prints; never changes a file. A candidate that is wrong or does
not fit the card is told and left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.measure import (
    make_arguments,
    make_check,
    more_arguments,
    pieces,
)
from ernie_engine.bench.kernels.timing import Timer
from ernie_engine.kernels import (
    decode_attention,
    linear,
    moe,
    moe_few,
    moe_grouped,
    moe_hopper,
    norm_moe,
    norm_qkv_rope,
    norm_router,
    norm_swiglu,
    prefill_attention,
    prefill_hopper,
    rms_norm,
    rope,
    router,
    swiglu,
    top_filter,
    vocab_head,
)
from ernie_engine.kernels.gemv import MOST_TOKENS
from ernie_engine.kernels.launch import DEFAULT, architecture, is_hopper
from ernie_engine.kernels.registry import IMPLEMENTATIONS

Params = dict[str, int]
Table = dict[tuple[str, int], Params]
Tell = Callable[[str], object]


def _size(case: KernelCase) -> int | None:
    return case.size


def _nothing(bucket: int) -> list[tuple[Table, Params]]:
    return []


def _everywhere(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Tunable:
    """A launch table of an op.

    `bucket` gives what the table goes by in a case; None: that case says nothing about it.
    `pinned`, for a bucket, rows of other tables without which the table would not be asked.
    `used_on` a device, or there is nothing to search.
    """

    name: str  # of the table: "linear.TABLE"
    table: Table
    candidates: Sequence[Params]
    bucket: Callable[[KernelCase], int | None] = _size
    pinned: Callable[[int], list[tuple[Table, Params]]] = _nothing
    used_on: Callable[[torch.device], bool] = _everywhere


def _few(limit: int) -> Callable[[KernelCase], int | None]:
    return lambda case: case.size if case.size <= limit else None


def _not_hopper(device: torch.device) -> bool:
    return not is_hopper(device)


def _splits(module: Any) -> Callable[[KernelCase], int | None]:
    """Programs before keys are split; of chunks behind a prefix, which is what splits are for."""

    def bucket(case: KernelCase) -> int | None:
        if "past" not in case.label:
            return None
        arguments = case.make(torch.device("meta"))
        return module.num_programs(arguments[0], arguments[1], len(arguments[5]))

    return bucket


# Tokens with which a tile size of the grouped products is at its best, under even routing.
TILE_OF = {64: 16, 256: 32, 1024: 64}


def _tile_of(case: KernelCase) -> int | None:
    return TILE_OF.get(case.size)


def _grouped(*more: tuple[Table, Params]) -> list[tuple[Table, Params]]:
    return [(moe.FEW, {"FEW": 0}), *more]


def _in_triton(*more: tuple[Table, Params]) -> list[tuple[Table, Params]]:
    return _grouped((moe_grouped.HOPPER, {"HOPPER": 0}), *more)


def _with_tile(block_m: int) -> list[tuple[Table, Params]]:
    return _in_triton((moe_grouped.TILE_TABLE, {"BLOCK_M": block_m}))


def _entries_of_an_expert(case: KernelCase) -> int | None:
    """Where all experts are here: else most entries are other ranks'."""
    if case.label.endswith("ep"):
        return None
    _, gate_up, _, weights, *_ = case.make(torch.device("meta"))
    return weights.numel() // len(gate_up)


def _ungrouped(_: int) -> list[tuple[Table, Params]]:
    return [(moe.FEW, {"FEW": 1})]


def _columns(case: KernelCase) -> int | None:
    """Of a weight, for one token."""
    return case.make(torch.device("meta"))[1].shape[1] if case.size == 1 else None


def _hidden_size(case: KernelCase) -> int | None:
    """For one token: what else a fusion's kernel may take it does one after the other."""
    return case.make(torch.device("meta"))[0].shape[1] if case.size == 1 else None


def _normed_numbers(case: KernelCase) -> int | None:
    """Tokens x hidden size, of the fewest tokens."""
    return case.make(torch.device("meta"))[0].numel() if case.size <= 2 else None


def _chosen_numbers(case: KernelCase) -> int | None:
    """Tokens x a routed expert's width, of the fewest tokens."""
    down = case.make(torch.device("meta"))[2]
    return case.size * down.shape[2] if case.size <= 2 else None


def _fusion(module: Any, row: Params, most_tokens: int) -> list[Tunable]:
    """`row` of FEW is one launch."""
    name, fused = module.__name__.rpartition(".")[2], [(module.FEW, row)]
    return [
        Tunable(f"{name}.TABLE", module.TABLE, module.CANDIDATES, _hidden_size, lambda _: fused),
        Tunable(f"{name}.FEW", module.FEW, module.FEW_CANDIDATES, _few(most_tokens)),
    ]


# op -> its tables, in the order of search: each finds the rows before it in use.
TUNABLE = {
    "linear": [
        Tunable(
            "linear.ROWS_TABLE",
            linear.ROWS_TABLE,
            linear.ROWS_CANDIDATES,
            _columns,
            lambda _: [(linear.FEW, {"FEW": 1})],
        ),
        Tunable(
            "linear.TABLE",
            linear.TABLE,
            linear.CANDIDATES,
            _few(64),
            lambda _: [(linear.FEW, {"FEW": 0}), (linear.LIBRARY, {"LIBRARY": 0})],
        ),
        Tunable("linear.FEW", linear.FEW, linear.FEW_CANDIDATES, _few(MOST_TOKENS)),
        Tunable("linear.LIBRARY", linear.LIBRARY, linear.LIBRARY_CANDIDATES),
    ],
    "norm_qkv_rope": _fusion(norm_qkv_rope, {"FEW": 1}, MOST_TOKENS),
    "norm_swiglu": _fusion(norm_swiglu, {"FEW": 1}, MOST_TOKENS),
    "norm_router": _fusion(norm_router, {"ROWS": 1}, 64),
    "norm_moe": [
        Tunable(
            "norm_moe.TABLE",
            norm_moe.TABLE,
            norm_moe.CANDIDATES,
            _normed_numbers,
            lambda _: [(norm_moe.FEW, {"FEW": 1})],
        ),
        Tunable("norm_moe.FEW", norm_moe.FEW, norm_moe.FEW_CANDIDATES, _few(MOST_TOKENS)),
    ],
    "rms_norm": [Tunable("rms_norm.TABLE", rms_norm.TABLE, rms_norm.CANDIDATES)],
    "add_rms_norm": [Tunable("rms_norm.TABLE", rms_norm.TABLE, rms_norm.CANDIDATES)],
    "rope_and_cache": [Tunable("rope.TABLE", rope.TABLE, rope.CANDIDATES)],
    "prefill_attention": [
        Tunable(
            "prefill_hopper.SPLIT_TABLE",
            prefill_hopper.SPLIT_TABLE,
            prefill_hopper.SPLIT_CANDIDATES,
            _splits(prefill_hopper),
            used_on=is_hopper,
        ),
        Tunable(
            "prefill_attention.SPLIT_TABLE",
            prefill_attention.SPLIT_TABLE,
            prefill_attention.SPLIT_CANDIDATES,
            _splits(prefill_attention),
            used_on=_not_hopper,
        ),
        Tunable(
            "prefill_attention.TABLE",
            prefill_attention.TABLE,
            prefill_attention.CANDIDATES,
            used_on=_not_hopper,
        ),
    ],
    "decode_attention": [
        Tunable("decode_attention.TABLE", decode_attention.TABLE, decode_attention.CANDIDATES)
    ],
    "swiglu": [Tunable("swiglu.TABLE", swiglu.TABLE, swiglu.CANDIDATES)],
    "router": [
        Tunable("router.TABLE", router.TABLE, router.CANDIDATES),
        Tunable("router.CHOICE_TABLE", router.CHOICE_TABLE, router.CHOICE_CANDIDATES),
    ],
    "moe_experts": [
        Tunable(
            "moe_few.GATE_UP_TABLE",
            moe_few.GATE_UP_TABLE,
            moe_few.GATE_UP_CANDIDATES,
            _hidden_size,
            _ungrouped,
        ),
        Tunable(
            "moe_few.DOWN_TABLE",
            moe_few.DOWN_TABLE,
            moe_few.DOWN_CANDIDATES,
            _chosen_numbers,
            _ungrouped,
        ),
        *(
            Tunable(f"moe_grouped.{name}", table, moe_grouped.CANDIDATES, _tile_of, _with_tile)
            for name, table in (
                ("GATE_UP_TABLE", moe_grouped.GATE_UP_TABLE),
                ("DOWN_TABLE", moe_grouped.DOWN_TABLE),
            )
        ),
        Tunable(
            "moe_grouped.TILE_TABLE",
            moe_grouped.TILE_TABLE,
            moe_grouped.TILE_CANDIDATES,
            pinned=lambda _: _in_triton(),
        ),
        Tunable(
            "moe_grouped.SHARED_TABLE",
            moe_grouped.SHARED_TABLE,
            moe_grouped.SHARED_CANDIDATES,
            pinned=lambda _: _in_triton(),
        ),
        Tunable(
            "moe_hopper.TABLE",
            moe_hopper.TABLE,
            moe_hopper.CANDIDATES,
            _entries_of_an_expert,
            lambda _: _grouped((moe_grouped.HOPPER, {"HOPPER": 1})),
            used_on=is_hopper,
        ),
        Tunable(
            "moe_grouped.HOPPER",
            moe_grouped.HOPPER,
            moe_grouped.HOPPER_CANDIDATES,
            pinned=lambda _: _grouped(),
            used_on=is_hopper,
        ),
        Tunable("moe.FEW", moe.FEW, moe.FEW_CANDIDATES, _few(16)),
    ],
    "sample": [Tunable("top_filter.TABLE", top_filter.TABLE, top_filter.CANDIDATES)],
    "vocab_head": [Tunable("vocab_head.TABLE", vocab_head.TABLE, vocab_head.CANDIDATES)],
}


@contextmanager
def only_row(table: Table, params: Params) -> Iterator[None]:
    """Every size is launched with `params`."""
    rows = dict(table)
    table.clear()
    table[DEFAULT, 1] = params
    try:
        yield
    finally:
        table.clear()
        table.update(rows)


@contextmanager
def launched_with(tunable: Tunable, bucket: int, params: Params) -> Iterator[None]:
    """Every case of that bucket is launched with the candidate."""
    with ExitStack() as stack:
        for table, pinned in (*tunable.pinned(bucket), (tunable.table, params)):
            stack.enter_context(only_row(table, pinned))
        yield


def by_bucket(tunable: Tunable, cases: Iterable[KernelCase]) -> dict[int, list[KernelCase]]:
    groups: dict[int, list[KernelCase]] = {}
    for case in cases:
        bucket = tunable.bucket(case)
        if bucket is not None:
            groups.setdefault(bucket, []).append(case)
    return dict(sorted(groups.items()))


def tune(
    tunable: Tunable, cases: Iterable[KernelCase], device: torch.device, timer: Timer, tell: Tell
) -> dict[int, tuple[Params, float]]:
    """Bucket -> the best candidate over the cases there, and the seconds of all of them with it."""
    best: dict[int, tuple[Params, float]] = {}
    if not tunable.used_on(device):
        tell(f"{tunable.name} is not used on this card")
        return best
    for bucket, group in by_bucket(tunable, cases).items():
        times = [_times(tunable, bucket, case, device, timer, tell) for case in group]
        if (place := _best_of(times)) is not None:
            best[bucket] = tunable.candidates[place], sum(of_case[place] for of_case in times)
            tell(f"{tunable.name} {bucket}: {best[bucket][0]}, {best[bucket][1] * 1e6:.1f} us")
    return best


def _best_of(times: Sequence[Sequence[float]]) -> int | None:
    """times [case][candidate] -> the candidate that is least behind the best of each case, each
    counting as much as any other; None if none can be used everywhere."""
    fastest = [min(of_case) for of_case in times]
    if float("inf") in fastest:
        return None
    behind = [
        sum(t / least for t, least in zip(of_candidate, fastest, strict=True))
        for of_candidate in zip(*times, strict=True)
    ]
    place = min(range(len(behind)), key=behind.__getitem__)
    return place if behind[place] < float("inf") else None


def _times(
    tunable: Tunable,
    bucket: int,
    case: KernelCase,
    device: torch.device,
    timer: Timer,
    tell: Tell,
) -> list[float]:
    """Of each candidate; infinite for one that cannot be used."""
    op, twin = (IMPLEMENTATIONS[case.op][name] for name in ("triton", "torch"))
    arguments = make_arguments(case, device)
    check, times = make_check(case, twin, arguments), []
    sets = [arguments, *more_arguments(case, device, timer, arguments)]
    for params in tunable.candidates:
        with launched_with(tunable, bucket, params):
            problem = _problem(check, op)
            usable = problem is None
            times.append(timer(pieces(op, sets), graph=True) if usable else float("inf"))
        if problem is not None:
            tell(f"{case.op} {case.label} {case.num_tokens}: {dict(params)} left out: {problem}")
    return times


def _problem(check: Callable[[Any], str | None], op: Any) -> str | None:
    try:
        return check(op)
    except TritonError as error:
        return str(error)
    except RuntimeError as error:
        if "PassManager" not in str(error):  # the compiler gave up: no word about the card
            raise
        return str(error)


def use(tunable: Tunable, device: torch.device, best: Mapping[int, tuple[Params, float]]) -> None:
    """What was found is the table of this process from now on."""
    arch = architecture(device)
    if best:
        for key in [key for key in tunable.table if key[0] == arch]:
            del tunable.table[key]
        tunable.table.update({(arch, bucket): params for bucket, (params, _) in best.items()})


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
