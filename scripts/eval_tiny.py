"""Asks ernie-tiny held-out questions and prints its accuracy by task, with 95% intervals.

Who answers: the engine, transformers (--backend transformers), or any OpenAI-compatible server
(--base-url). --compare lays two runs side by side, question by question. See --help.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tiny.answerer import TransformersAnswerer
from tiny.checking import MAX_NEW_TOKENS, questions
from tiny.tasks import TASK_NAMES

from ernie_engine import Engine, SamplingParams
from ernie_engine.evals.harness import Record, read_records, run, write_records
from ernie_engine.evals.report import compare, scores, table
from ernie_engine.evals.transport import Answerer, EngineAnswerer, UrlAnswerer

KV_BYTES = 2 << 30  # a tiny model needs no card of its own
SIZES = "tensor_parallel_size", "pipeline_parallel_size"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/ernie-tiny", help="folder, or name at the URL")
    parser.add_argument("--backend", choices=("engine", "transformers"), default="engine")
    parser.add_argument("--base-url", help="ends in /v1; takes the place of --backend")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--dtype", default="float32", help="of engine or transformers")
    parser.add_argument("--device", default="cpu", help="of engine or transformers")
    for name in SIZES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=1, help="of engine")
    parser.add_argument("--task", action="append", choices=TASK_NAMES, help="may be repeated")
    parser.add_argument("--limit", type=int, default=500, help="questions a task")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn questions")
    parser.add_argument("--batch", type=int, default=64, help="questions asked at once")
    parser.add_argument("--output", type=Path, help="write one line of JSON a question")
    parser.add_argument("--compare", type=Path, nargs=2, help="two such files; asks nothing")
    return parser.parse_args(arguments)


@contextmanager
def answerer(args: argparse.Namespace) -> Iterator[Answerer]:
    """Whoever the options name."""
    if args.base_url:
        yield UrlAnswerer(args.base_url, args.model, args.api_key)
    elif args.backend == "transformers":
        yield TransformersAnswerer(Path(args.model), args.dtype, args.device)
    else:
        sizes = {name: getattr(args, name) for name in SIZES}
        sizes |= {"kv_cache_memory_bytes": KV_BYTES}
        with Engine(model=args.model, dtype=args.dtype, device=args.device, **sizes) as engine:
            yield EngineAnswerer(engine, SamplingParams)


def evaluate(args: argparse.Namespace) -> list[Record]:
    asked = questions(args.task or TASK_NAMES, args.limit, args.seed)
    with answerer(args) as ask:
        records = run(asked, ask, MAX_NEW_TOKENS, args.batch)
    if args.output:
        write_records(args.output, records)
    return records


def main() -> None:
    """A table for people, then one line of JSON."""
    args = parse()
    rows = compare(*map(read_records, args.compare)) if args.compare else scores(evaluate(args))
    print(table(rows))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
