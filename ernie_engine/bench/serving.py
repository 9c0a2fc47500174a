"""Runs of a workload, one for each concurrency, against whoever a driver speaks to.

Owns their order (probe, then the clock) and the record that a run becomes. Never times anything
itself, never prints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ernie_engine.bench.floors import Ceilings, generation_seconds
from ernie_engine.bench.metrics import OnDone, Run, figures
from ernie_engine.bench.workload import PlannedRequest, WorkloadSpec, plan_requests, probe_request
from ernie_engine.config import ModelConfig


class Driver(Protocol):
    """Sends requests at their arrivals, never more than max_concurrency at once."""

    def run(
        self, requests: Sequence[PlannedRequest], max_concurrency: int | None, on_done: OnDone
    ) -> Run: ...


@dataclass(frozen=True)
class Measurement:
    """One run. `num_asked`: output tokens that its requests asked for."""

    max_concurrency: int | None
    run: Run
    num_asked: int


def measure(
    driver: Driver,
    spec: WorkloadSpec,
    ids: np.ndarray,
    concurrencies: Sequence[int | None],
    progress: bool = True,
) -> Iterator[Measurement]:
    """A measurement for each of `concurrencies` (None: no bound), as they end.

    ValueError if the probe request, sent before them, fails.
    """
    for error in (log.error for log in driver.run([probe_request(spec, ids)], None, _ignore).logs):
        if error is not None:
            raise ValueError(f"the probe request failed: {error}")
    for index, concurrency in enumerate(concurrencies):
        requests = plan_requests(spec, ids, index)
        name = "requests" if concurrency is None else f"concurrency {concurrency}"
        with tqdm(total=len(requests), desc=name, unit="req", disable=not progress) as bar:
            run = driver.run(requests, concurrency, lambda _, bar=bar: bar.update())
        yield Measurement(concurrency, run, sum(request.output_len for request in requests))


def run_row(
    measurement: Measurement, percentiles: Sequence[float], goodput: Mapping[str, float] | None
) -> dict[str, Any]:
    """A measurement as a flat record: for the table and for the JSON line."""
    run = measurement.run
    errors = dict.fromkeys(log.error for log in run.logs if log.error is not None)
    return {
        "max_concurrency": measurement.max_concurrency,
        **figures(run, percentiles, goodput),
        "asked_output_tokens": measurement.num_asked,
        "errors": list(errors)[:3],
    }


def ceiling_throughput(
    spec: WorkloadSpec, max_num_seqs: int, config: ModelConfig, dtype: str, ceilings: Ceilings
) -> float | None:
    """Output tokens a second that the device allows for a uniform workload that all runs at once;
    None for others, whose batches are not known beforehand."""
    if not spec.is_uniform or spec.num_prompts > max_num_seqs:
        return None
    size = spec.num_prompts, spec.max_input_len, spec.max_output_len
    seconds = generation_seconds(config, *size, dtype, ceilings)
    return spec.num_prompts * spec.max_output_len / seconds


def _ignore(_: object) -> None:
    pass
