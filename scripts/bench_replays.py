"""Microseconds of a decode step's graph, with launch rows as they are and changed, in turns.

python scripts/bench_replays.py --model configs/ernie-4.5-21b-a3b --load-format dummy \\
    --batches 1x130 1x32000 256x128-384 \\
    --change decode_attention.TABLE:1024:num_stages=3 \\
    --change router.CHOICE_TABLE:1024:ROWS=4 expert_sort.SORT_TABLE:2048:BLOCK=128,ROUND=128

Each --change is a variant, of one row or more; a bucket that a table does not have is added to it.
A star: not all bits of the hidden stream are those of the first row of the output, as is right
where sums are cut in another way. One rank; needs a GPU. Prints a line of JSON last.
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
    batches = [parse_batch(text) for text in args.batches]
    variants = {UNCHANGED: []} | {
        " ".join(texts): [parse_change(text) for text in texts] for texts in args.change
    }
    config = EngineConfig(**_fields(args, batches))
    runner = open_runner(config)
    width, rows = max(map(len, variants)), []
    print(" " * width, *(f"{batch.name:>12}" for batch in batches), flush=True)
    replays = Replays(runner)
    for row in measure_all(replays, batches, variants, args.turns, runner.state.device):
        rows.append(row)
        marks = (" " if row["equal"][batch.name] else "*" for batch in batches)
        cells = (f"{row['us'][b.name]:11.1f}{mark}" for b, mark in zip(batches, marks, strict=True))
        print(f"{row['variant']:{width}}", *cells, flush=True)
    print(json_line("replays", {"engine": asdict(config)}, {"rows": rows}))
    return 0


def _fields(args: argparse.Namespace, batches: Sequence[Batch]) -> dict[str, Any]:
    """As large as the batches are; nothing is recorded but what is timed."""
    sizes = {
        "max_num_seqs": max(len(batch.contexts) for batch in batches),
        "max_model_len": max(max(batch.contexts) for batch in batches) + ROOM + 1,
    }
    return engine_fields(args) | sizes | {"enforce_eager": True}


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
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
