"""Figures for people (tables) and for programs (one JSON line, printed last).

Never computes a figure.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_engine.bench.environment import environment
from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.metrics import LATENCIES

STEP_HEADER = (
    f"{'case':<9} {'time':>17} {'prompt tok/s':>13} {'floor ms':>9} {'share':>6}  bound   note"
)
THROUGHPUTS = {
    "request_throughput": "requests/s",
    "request_goodput": "requests/s within the limits",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "input and output tokens/s",
    "max_output_tokens_per_s": "most output tokens in a second",
    "max_concurrent_requests": "most requests alive in a second",
}


def ceilings_line(ceilings: Ceilings, device: str, dtype: str) -> str:
    return (
        f"ceilings measured on {device}: {ceilings.bytes_per_s / 1e12:.3g} TB/s, "
        f"{ceilings.flops_per_s / 1e12:.3g} TFLOP/s in {dtype}"
    )


def step_line(row: Mapping[str, Any]) -> str:
    """One case of --steps (a steps.step_row) under STEP_HEADER."""
    if "floor_ms" not in row:
        return f"{row['case']:<9} {row['note']}"
    is_step = "ms_per_step" in row
    time = f"{row['ms_per_step']:.2f} ms/step" if is_step else f"{row['ms']:.1f} ms"
    rate = "" if is_step else f"{row['prompt_tokens_per_s']:,.0f}"
    notes = "; ".join(filter(None, [row.get("note", ""), _peak(row)]))
    return (
        f"{row['case']:<9} {time:>17} {rate:>13} {row['floor_ms']:>9.3g} "
        f"{row['share_of_floor']:>6.1%}  {row['bound']:<7} {notes}"
    ).rstrip()


def _peak(row: Mapping[str, Any]) -> str:
    if "peak_gib" not in row:
        return ""
    above = row["peak_above_held_gib"]
    return f"peak {row['peak_gib']:.1f} GiB, {above:.2f} above what was held"


def trace_lines(trace: Mapping[str, Any]) -> str:
    """The figures of one case's traced steps (trace.summarize()), under its step_line()."""
    if trace["steps"] == 0:
        return "  no step of the whole batch was traced: it takes more new tokens"
    lines = [
        f"  traced {trace['steps']} steps of {trace['step_us']:,.0f} us (medians): "
        f"host {trace['host_us']:,.0f} us, waiting {trace['waited_us']:,.0f} us",
        f"  phases, us: {_phases(trace['phases_us'])}",
    ]
    if "host_alone_us" in trace:
        lines += [
            f"  without the profiler: host {trace['host_alone_us']:,.0f} us: "
            f"{_phases(trace['phases_alone_us'])}"
        ]
    gpu = [f"  {trace['note']}"] if trace["gpu"] is None else _gpu_lines(trace["gpu"])
    return "\n".join(lines + gpu)


def _phases(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {us:,.0f}" for name, us in phases.items())


def _gpu_lines(gpu: Mapping[str, Any]) -> list[str]:
    idle = gpu["idle_us"] or dict.fromkeys(("median", "max"))
    lines = [
        f"  GPU busy {gpu['busy_share']:.1%}, idle between steps {_number(idle['median'])} us "
        f"(most {_number(idle['max'])}); {gpu['launches']:g} launches and {gpu['copies']:g} copies "
        f"a step, {gpu['kernels']:g} kernels"
    ]
    return lines + [
        f"  {kernel['us']:>10,.1f} us {kernel['count']:>7g} x {kernel['name']:.70}"
        for kernel in gpu["top_kernels"]
    ]


def run_table(row: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """One run (a serving.run_row)."""
    concurrency = row["max_concurrency"]
    bound = "no bound on concurrency" if concurrency is None else f"concurrency {concurrency}"
    lines = ["", f"{bound}: {row['completed']} completed, {row['failed']} failed"]
    lines[1] += f" in {row['duration']:.2f} s"
    lines += [
        f"  {_number(row[key]):>12}  {text}" for key, text in THROUGHPUTS.items() if key in row
    ]
    if "share_of_ceiling" in row:
        ceiling = f"{row['ceiling_output_throughput']:,.0f} output tokens/s"
        lines.append(f"  {row['share_of_ceiling']:>12.1%}  of what the device allows: {ceiling}")
    lines += [f"  note: {note}" for note in _notes(row)]
    kinds = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    lines.append(f"  {'ms':<6}" + "".join(f"{kind:>11}" for kind in kinds))
    for name in LATENCIES:
        cells = [_number(row[f"{kind}_{name}_ms"]) for kind in kinds]
        lines.append(f"  {name.upper():<6}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def interruption_table(row: Mapping[str, Any]) -> str:
    """A pair of runs (an interruption.interruption_row)."""
    head = f"a prompt of {row['prompt_len']:,} tokens comes in: its first token after "
    tail = f"p{row['percentile']:g}"
    lines = ["", f"{head}{row['ttft_ms']:,.0f} ms", f"  {'the others, ms between tokens':<40}"]
    lines[-1] += "".join(f"{kind:>11}" for kind in ("median", tail, "longest"))
    names = {"alone": "without it", "interrupted": "with it", "meanwhile": "while it was read"}
    for name, text in names.items():
        cells = [_number(row[name][kind]) for kind in ("median", "tail", "max")]
        what = f"{text} ({row[name]['count']:,} gaps)"
        lines.append(f"    {what:<38}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What makes the figures another thing than was asked for."""
    notes = [f"failed: {error}" for error in row["errors"]]
    asked, got = row["asked_output_tokens"], row["total_output_tokens"]
    if row["failed"] == 0 and asked != got:
        notes.append(f"{asked:,} output tokens were asked for, {got:,} came")
    if row["total_cached_tokens"]:
        notes.append(f"{row['total_cached_tokens']:,} input tokens came from a prefix cache")
    return notes


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def json_line(kind: str, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The report as one line of JSON: {"bench": kind, environment, "config", results}."""
    report = {"bench": kind, **environment(), "config": dict(config), **results}
    return json.dumps(report, ensure_ascii=False, allow_nan=False)
