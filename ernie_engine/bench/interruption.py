"""What a long prompt that comes in costs those who are reading their answers.

A workload runs alone, and again with one long prompt arriving in its middle. Owns that pair and its
figures: gaps between tokens without it, with it, and while it was read. Times nothing itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_engine.bench.metrics import RequestLog, Run
from ernie_engine.bench.serving import Driver, Measurement
from ernie_engine.bench.workload import PlannedRequest, WorkloadSpec, plan_requests, random_prompts


@dataclass(frozen=True)
class Interruption:
    """`others`: the workload's logs while the long prompt, `late`, came in."""

    alone: Run
    others: Sequence[RequestLog]
    late: RequestLog

    @property
    def gaps_meanwhile(self) -> list[float]:
        """Those between the others' tokens that overlap with the long prompt's reading."""
        return [
            gap
            for log in self.others
            for gap, end in zip(log.itl, log.token_times[1:], strict=True)
            if self.late.sent < end and end - gap < self.late.token_times[0]
        ]


def interrupt(
    driver: Driver, spec: WorkloadSpec, ids: np.ndarray, alone: Measurement, prompt_len: int
) -> Interruption:
    """Run `spec` again; after half the time that it took `alone` a prompt of `prompt_len` random
    tokens arrives and asks for one. ValueError if a request fails or nobody waits meanwhile."""
    rng = np.random.default_rng([spec.seed, 1, 2])
    late = PlannedRequest(random_prompts(ids, [prompt_len], rng)[0], 1, alone.run.duration / 2)
    requests = sorted([*plan_requests(spec, ids, 1), late], key=lambda request: request.arrival)
    logs = list(driver.run(requests, None, lambda _: None).logs)
    for log in (*alone.run.logs, *logs):
        if log.error is not None:
            raise ValueError(f"a request of {log.num_input_tokens} tokens failed: {log.error}")
    found = next(log for log in logs if log.num_input_tokens == prompt_len)  # none other is so long
    interruption = Interruption(alone.run, [log for log in logs if log is not found], found)
    if not interruption.gaps_meanwhile:
        raise ValueError(
            f"long_prompt={prompt_len}: nobody waited for a token while it was read; "
            "ask for a greater max_output_len"
        )
    return interruption


def check_fits(prompt_len: int, spec: WorkloadSpec, max_model_len: int) -> None:
    """ValueError if the engine could not take the long prompt, or it is none, or the others'
    answers have no gaps."""
    longest = spec.bounds("input")[1]
    if not longest < prompt_len < max_model_len:
        raise ValueError(
            f"long_prompt={prompt_len} must be above max_input_len={longest} and below "
            f"max_model_len={max_model_len}"
        )
    if spec.bounds("output")[0] < 2:
        raise ValueError("long_prompt needs a min_output_len of 2 or more: gaps between tokens")


def interruption_row(found: Interruption, percentile: float = 99) -> dict[str, Any]:
    """Milliseconds: the long prompt's time to first token, and of the others' gaps between tokens
    the median, a percentile and the longest."""
    late = found.late
    gaps = {
        "alone": [gap for log in found.alone.completed for gap in log.itl],
        "interrupted": [gap for log in found.others for gap in log.itl],
        "meanwhile": found.gaps_meanwhile,
    }
    return {
        "prompt_len": late.num_input_tokens,
        "ttft_ms": 1e3 * late.ttft,
        "percentile": percentile,
        **{name: _statistics(values, percentile) for name, values in gaps.items()},
    }


def _statistics(gaps: Sequence[float], percentile: float) -> dict[str, float | int]:
    values = 1e3 * np.array(gaps)
    kinds = {"median": np.median(values), "tail": np.percentile(values, percentile)}
    return {"count": len(gaps)} | {k: float(v) for k, v in (*kinds.items(), ("max", values.max()))}
