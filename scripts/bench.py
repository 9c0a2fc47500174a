"""Measure an engine in this process (--model DIR), or a server (--base-url URL).

python scripts/bench.py --model DIR --steps                      decode ms/step and prefill
python scripts/bench.py --model DIR --steps --trace t.json       and a trace of some of the steps
python scripts/bench.py --model DIR --profile seed               128 requests at once, 1024 + 1024
python scripts/bench.py --model DIR --long-prompt 32000 ...      the others' gaps while it is read
python scripts/bench.py --base-url http://127.0.0.1:30000/v1 --max-concurrency 1 8 32 --plot b.png

Prints tables for people, and one line of JSON last. For speed without weights, a folder that holds
only config.json will do, with --load-format dummy. A server's key is read from OPENAI_API_KEY.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ernie_engine import Engine, EngineConfig, EngineDeadError
from ernie_engine.bench.ceilings import measure_ceilings
from ernie_engine.bench.environment import device_name
from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.interruption import check_fits, interrupt, interruption_row
from ernie_engine.bench.metrics import parse_goodput
from ernie_engine.bench.recorder import Tracer
from ernie_engine.bench.report import (
    STEP_HEADER,
    ceilings_line,
    interruption_table,
    json_line,
    run_table,
    step_line,
    trace_lines,
)
from ernie_engine.bench.serving import Measurement, measure, run_row
from ernie_engine.bench.steps import MAX_MODEL_LEN, StepBench, choose_cases, step_row
from ernie_engine.bench.targets import (
    ServerOptions,
    Target,
    engine_facts,
    engine_target,
    server_target,
)
from ernie_engine.bench.workload import GREEDY, PROFILES, SAMPLED, WorkloadSpec
from ernie_engine.cli import add_arguments, add_engine_arguments, chosen_fields, engine_fields
from ernie_engine.config import ModelConfig
from ernie_engine.engine.core import Description, describe


def main() -> int:
    args = _parse(sys.argv[1:])
    try:
        _check_trace(args.trace)
        if args.steps:
            _shorten_context(args)
        if args.base_url is None and _describe(args).world.rank > 0:
            Engine(**engine_fields(args))  # works for rank 0, which measures, to its end
            return 0
        return _measure_steps(args) if args.steps else _measure_runs(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _measure_steps(args: argparse.Namespace) -> int:
    cases, rows = choose_cases(args.only, args.num_tokens), []
    with _open_engine(args) as (engine, ceilings):
        tracer = None if args.trace is None else _tracer(engine, args.trace)
        options = {"sampled": args.sampled, "seed": args.seed, "budget_s": args.budget_s}
        print(STEP_HEADER, flush=True)
        for result in StepBench(engine, **options, tracer=tracer).run(cases):
            rows.append(step_row(result, ceilings))
            print(step_line(rows[-1]), flush=True)
            if result.trace is not None:
                print(trace_lines(result.trace), flush=True)
        config = {**engine_facts(engine), "sampled": args.sampled, "seed": args.seed}
    if tracer is not None:
        tracer.write()
    print(json_line("steps", config, {"ceilings": asdict(ceilings), "cases": rows}))
    return 0


def _check_trace(path: Path | None) -> None:
    """Before minutes of measuring."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"trace={str(path)!r}: there is no folder {str(path.parent)!r}")


def _tracer(engine: Engine, path: Path) -> Tracer:
    has_gpu = engine.config.device.startswith("cuda")
    return Tracer(path, engine.phases, has_gpu, engine.config.max_steps_in_flight)


def _measure_runs(args: argparse.Namespace) -> int:
    """Exit code 1 if not one request was answered, or a long prompt told nothing."""
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'ernie-engine[bench]'")
    goodput = parse_goodput(args.goodput)
    spec = WorkloadSpec(**chosen_fields(args, WorkloadSpec))
    if args.long_prompt is not None:
        _check_long_prompt(args, spec)
    sampling = {**(SAMPLED if args.sampled else GREEDY), "ignore_eos": args.ignore_eos}
    with _target(args, spec, sampling) as target:
        rows, measurements = _run_all(args, spec, target, goodput)
        results: dict[str, Any] = {"runs": rows}
        if args.long_prompt is not None:
            results["long_prompt"] = _interrupt(args, spec, target, measurements[0])
    config = {"workload": asdict(spec), "sampling": sampling, **target.facts}
    print(json_line("runs", config, results))
    if args.plot is not None:
        _draw(args.plot, target.title, measurements)
    failed = "error" in results.get("long_prompt", {})
    return 0 if any(row["completed"] for row in rows) and not failed else 1


def _run_all(
    args: argparse.Namespace,
    spec: WorkloadSpec,
    target: Target,
    goodput: dict[str, float] | None,
) -> tuple[list[dict[str, Any]], list[Measurement]]:
    rows, measurements = [], []
    for measurement in measure(target.driver, spec, target.ids, args.max_concurrency):
        row = run_row(measurement, args.percentiles, goodput)
        if target.ceiling is not None and measurement.max_concurrency is None:
            row["ceiling_output_throughput"] = target.ceiling
            row["share_of_ceiling"] = row["output_throughput"] / target.ceiling
        rows.append(row)
        measurements.append(measurement)
        print(run_table(row, args.percentiles), flush=True)
    return rows, measurements


def _check_long_prompt(args: argparse.Namespace, spec: WorkloadSpec) -> None:
    if args.base_url is not None or args.max_concurrency != [None]:
        raise ValueError("--long-prompt needs --model, and all requests open at once")
    check_fits(args.long_prompt, spec, _describe(args).config.max_model_len)


def _interrupt(
    args: argparse.Namespace, spec: WorkloadSpec, target: Target, alone: Measurement
) -> dict[str, Any]:
    try:
        found = interrupt(target.driver, spec, target.ids, alone, args.long_prompt)
    except ValueError as error:  # what was measured before it is still told
        print(f"error: {error}", file=sys.stderr)
        return {"error": str(error)}
    row = interruption_row(found, args.percentiles[-1])
    print(interruption_table(row), flush=True)
    return row


def _draw(path: Path, title: str, measurements: Sequence[Measurement]) -> None:
    from ernie_engine.bench.plot import draw_runs  # noqa: PLC0415  (matplotlib is optional)

    draw_runs(path, title, measurements)


# --- whom ---


@contextmanager
def _target(
    args: argparse.Namespace, spec: WorkloadSpec, sampling: dict[str, Any]
) -> Iterator[Target]:
    if args.base_url is None:
        spec.check_fits(_describe(args).config.max_model_len)  # before minutes of loading
        with _open_engine(args) as (engine, ceilings):
            yield engine_target(engine, spec, ceilings, sampling)
    else:
        options = ServerOptions(**chosen_fields(args, ServerOptions))
        key = os.environ.get("OPENAI_API_KEY")
        yield server_target(args.base_url, key, options, spec, sampling)


@contextmanager
def _open_engine(args: argparse.Namespace) -> Iterator[tuple[Engine, Ceilings]]:
    """The engine that the flags describe, and what its device reaches, measured before."""
    config = _describe(args).config
    ceilings = measure_ceilings(torch.device(config.device), getattr(torch, config.dtype))
    print(ceilings_line(ceilings, device_name(), config.dtype), flush=True)
    ceilings = ceilings.of_ranks(config.tensor_parallel_size)
    with Engine(**engine_fields(args)) as engine:
        yield engine, ceilings


def _describe(args: argparse.Namespace) -> Description:
    return describe(EngineConfig(**engine_fields(args)))


def _shorten_context(args: argparse.Namespace) -> None:
    """Unless it is said otherwise, --steps asks for no longer context than its cases need."""
    longest = ModelConfig.from_folder(Path(args.model)).max_position_embeddings
    args.max_model_len = args.max_model_len or min(MAX_MODEL_LEN, longest)


# --- flags ---


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Which flags there are depends on what is measured."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--base-url", help="of an OpenAI-compatible API, such as http://HOST:PORT/v1"
    )
    first.add_argument("--steps", action="store_true", help="decode ms/step and prefill")
    first.add_argument("--profile", choices=PROFILES, help="a named workload")
    known, _ = first.parse_known_args(argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[first],
        allow_abbrev=False,
    )
    _add_step_arguments(parser)
    _add_run_arguments(parser)
    if known.base_url is None:
        add_engine_arguments(parser)
        parser.set_defaults(enable_prefix_caching=False)
    else:
        add_arguments(parser, ServerOptions, "server")
    parser.set_defaults(**PROFILES.get(known.profile, {}))
    args = parser.parse_args(argv)
    if args.steps and args.base_url:
        parser.error("--steps needs --model: it measures an engine in this process")
    if args.long_prompt and args.steps:
        parser.error("--long-prompt goes with runs, not with --steps")
    if args.trace and not args.steps:
        parser.error("--trace needs --steps: it traces their cases")
    return args


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps (with --steps)")
    group.add_argument("--only", help="cases by name, or decode, prefill; comma-separated")
    group.add_argument(
        "--num-tokens", type=int, help="new tokens of decode cases, for a first look"
    )
    group.add_argument("--budget-s", type=float, help="begin no measurement that would end later")
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="run each case once more and write a Chrome trace of some of its steps (for "
        "Perfetto): kernels, and what the host did meanwhile. Tracing slows steps down, so the "
        "traced ones are not among the timed ones",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, WorkloadSpec, "workload")
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--max-concurrency",
        type=_positive,
        nargs="+",
        default=[None],
        help="requests open at once; a run for each",
    )
    group.add_argument(
        "--long-prompt",
        type=_positive,
        metavar="TOKENS",
        help="run once more, with a prompt so long coming in half-way: what it does to the others",
    )
    group.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.8")
    group.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    report = parser.add_argument_group("report")
    report.add_argument("--percentiles", type=float, nargs="+", default=[99.0])
    report.add_argument("--goodput", nargs="+", metavar="NAME:MS", help="ttft, tpot, e2el limits")
    report.add_argument("--plot", type=Path, metavar="FILE.png")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
