"""Measure the ops one by one, at the sizes that a rank of the real models sees.

python scripts/bench_kernels.py                                          all ops, sizes, layouts
python scripts/bench_kernels.py --only sample router --num-tokens 1 64   some
python scripts/bench_kernels.py --tune --only swiglu --shapes "21B tp1"  rows for its launch table

A kernel is compared with its plain-torch twin before it is timed; one that is wrong is told, not
timed, and makes the exit code 1. Shares are of what this card was measured to reach in this run.
Prints a table for people, and one line of JSON last.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from ernie_engine.bench.ceilings import measure_ceilings
from ernie_engine.bench.environment import device_name
from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.measure import measure
from ernie_engine.bench.kernels.report import HEADER, draw, line
from ernie_engine.bench.kernels.shapes import NUM_TOKENS, SHAPES
from ernie_engine.bench.kernels.table import CASES, ops_with
from ernie_engine.bench.kernels.timing import make_timer
from ernie_engine.bench.kernels.tune import TUNABLE, table_rows, tune, use
from ernie_engine.bench.report import ceilings_line, json_line

DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    args = _parse()
    try:
        return _tune(args) if args.tune else _measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    """Exit code 1 if a kernel is wrong."""
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'ernie-engine[bench]'")
    device, rows = torch.device(args.device), []
    cases = list(_cases(args))
    ceilings = _ceilings(args, device)
    print(HEADER, flush=True)
    for measurement in measure(
        cases, args.implementation, device, make_timer(device, args.repeats)
    ):
        rows.append(measurement.row(ceilings))
        print(line(rows[-1]), flush=True)
    print(json_line("kernels", _config(args), {"ceilings": asdict(ceilings), "rows": rows}))
    if args.plot is not None:
        draw(args.plot, f"{args.implementation} on {device_name()}, {args.dtype}", rows)
    return 1 if any("problem" in row for row in rows) else 0


def _tune(args: argparse.Namespace) -> int:
    device, found = torch.device(args.device), {}
    timer = make_timer(device, args.repeats)
    ops = [op for op in _ops(args) if op in TUNABLE]
    if not ops:
        raise ValueError(f"--only: none of these has a launch table; use some of {list(TUNABLE)}")
    for op, tunable in [(name, tunable) for name in ops for tunable in TUNABLE[name]]:
        cases = [case for case in _cases(args) if case.op == op]
        best = tune(tunable, cases, device, timer, lambda told: print(told, flush=True))
        use(tunable, device, best)
        print(f"{op}: best rows of {tunable.name}", *table_rows(device, best), sep="\n", flush=True)
        rows = {bucket: {**params, "us": s * 1e6} for bucket, (params, s) in best.items()}
        found.setdefault(op, {})[tunable.name] = rows
    print(json_line("kernels-tune", _config(args), {"best": found}))
    return 0


def _ceilings(args: argparse.Namespace, device: torch.device) -> Ceilings:
    ceilings = measure_ceilings(device, getattr(torch, args.dtype))
    print(ceilings_line(ceilings, device_name(), args.dtype), flush=True)
    return ceilings


def _ops(args: argparse.Namespace) -> list[str]:
    """ValueError for an op that does not exist or cannot run as asked."""
    there = ops_with(args.implementation, torch.device(args.device).type)
    if lacking := [op for op in args.only or () if op not in there]:
        raise ValueError(f"--only: no {args.implementation} implementation of {lacking}: {there}")
    return args.only or there


def _cases(args: argparse.Namespace) -> Iterator[KernelCase]:
    for op in _ops(args):
        for shape in args.shapes:
            for num_tokens in args.num_tokens:
                yield from CASES[op](SHAPES[shape], num_tokens, getattr(torch, args.dtype))


def _config(args: argparse.Namespace) -> dict:
    chosen = ("implementation", "dtype", "device", "shapes", "num_tokens", "repeats")
    return {name: getattr(args, name) for name in chosen} | {"ops": _ops(args)}


def _parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    gpu = "cuda:0" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="OP")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--num-tokens", nargs="+", type=int, default=NUM_TOKENS)
    parser.add_argument("--implementation", default="triton", help="of the ops; default: triton")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default=gpu)
    parser.add_argument("--repeats", type=int, default=30, help="runs of which the median is taken")
    parser.add_argument("--tune", action="store_true", help="search rows for launch tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
