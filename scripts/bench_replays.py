"""Microseconds of a decode step's graph, with launch rows as they are and changed, in turns.

python scripts/bench_replays.py --model configs/ernie-4.5-21b-a3b --load-format dummy \\
    --batches 1x130 1x32000 256x128-384 \\
    --change decode_attention.TABLE:1024:num_stages=3 \\
    --change router.CHOICE_TABLE:1024:ROWS=4 expert_sort.SORT_TABLE:2048:BLOCK=128,ROUND=128

Each --change is a variant, of one row or more; a bucket that a table does not have is added to it.
A star: not all bits of the hidden stream are those of the first line's, as is right where sums are
cut in another way. Above 64 rows the vocabulary head is not part of it. One rank; needs a GPU. A
variant that cannot be launched is told, and makes the exit code 1. Prints a line of JSON last.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ernie_engine import EngineConfig
from ernie_engine.bench.replays import (
    ROOM,
    Batch,
    Replays,
    measure_all,
    open_runner,
    parse_batch,
    parse_change,
)
from ernie_engine.bench.report import json_line
from ernie_engine.cli import add_engine_arguments, engine_fields

UNCHANGED = "as they are"


def main() -> int:
    args = _parse(sys.argv[1:])
    try:
        return _measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    """Exit code 1 if a variant could not be launched."""
    batches = [parse_batch(text) for text in dict.fromkeys(args.batches)]
    variants = {UNCHANGED: []} | {
        " ".join(texts): [parse_change(text) for text in texts] for texts in args.change
    }
    config = EngineConfig(**_fields(args, batches))
    replays, reports = Replays(open_runner(config)), []
    width = max(map(len, variants))
    print(" " * width, *(f"{batch.name:>12}" for batch in batches), flush=True)
    for report in measure_all(replays, batches, variants, args.turns):
        reports.append(report)
        print(f"{report['variant']:{width}}", _cells(report, batches), flush=True)
    print(json_line("replays", {"engine": asdict(config)}, {"rows": reports}))
    return int(any("problem" in report for report in reports))


def _cells(report: dict[str, Any], batches: Sequence[Batch]) -> str:
    if "problem" in report:
        return report["problem"]
    marks = {name: " " if is_equal else "*" for name, is_equal in report["equal"].items()}
    return " ".join(f"{report['us'][b.name]:11.1f}{marks[b.name]}" for b in batches)


def _fields(args: argparse.Namespace, batches: Sequence[Batch]) -> dict[str, Any]:
    """As large as the batches are; nothing is recorded but what is timed."""
    fields, default = engine_fields(args), EngineConfig(model=args.model)
    sizes = {
        "max_num_seqs": max(len(batch.contexts) for batch in batches),
        "max_model_len": max(max(batch.contexts) for batch in batches) + ROOM + 1,
        "enforce_eager": True,
    }
    for name in sizes:
        if fields[name] != getattr(default, name):
            raise ValueError(f"{name}={fields[name]}: it follows from the batches here")
    return fields | sizes


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--batches", nargs="+", required=True, help="ROWSxCONTEXT, or ROWSxFIRST-LAST"
    )
    parser.add_argument("--change", nargs="+", action="append", default=[], help="see above")
    parser.add_argument("--turns", type=int, default=2, help="how often all variants are timed")
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: at least one")
    return args


if __name__ == "__main__":
    sys.exit(main())
