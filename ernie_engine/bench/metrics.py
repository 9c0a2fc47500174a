"""Event logs -> figures, by the definitions of vLLM's benchmark client and with its words.

Pure functions of times. Times are seconds on one clock, latencies in the figures milliseconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2el")
GOODPUT_LIMITS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class RequestLog:
    """What one request did. `error` says why it has no (whole) answer; it then counts as failed."""

    sent: float
    token_times: Sequence[float]  # when each token chunk came
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0  # of the input, found in a prefix cache
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token: the first token chunk after the sending."""
        return self.token_times[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: the last token chunk after the sending."""
        return self.token_times[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is no second one."""
        if self.num_output_tokens <= 1:
            return None
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1)

    @property
    def itl(self) -> Sequence[float]:
        """Inter-token latencies: the gaps between consecutive token chunks."""
        return np.diff(self.token_times).tolist()


OnDone = Callable[[RequestLog], object]  # told of each request as it ends


@dataclass(frozen=True)
class Run:
    """A whole run: every request's log, in the order of the requests or of their ends, and how
    long it took from the first arrival to the last end."""

    logs: Sequence[RequestLog]
    duration: float

    @property
    def completed(self) -> list[RequestLog]:
        return [log for log in self.logs if log.error is None]


def figures(
    run: Run, percentiles: Sequence[float] = (99,), goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All figures of a run under vLLM's names; None where nothing was there to measure.

    `goodput`: limits in milliseconds for some of ttft, tpot and e2el.
    """
    done = run.completed
    num_inputs = sum(log.num_input_tokens for log in done)
    num_outputs = sum(log.num_output_tokens for log in done)
    rates = {
        "request_throughput": len(done) / run.duration,
        "output_throughput": num_outputs / run.duration,
        "total_token_throughput": (num_inputs + num_outputs) / run.duration,
    }
    if goodput is not None:
        num_good = sum(is_good(log, goodput) for log in done)
        rates["request_goodput"] = num_good / run.duration
    latencies = {}
    for name in LATENCIES:
        latencies |= _statistics(name, latency_samples(run, name), percentiles)
    return {
        "completed": len(done),
        "failed": len(run.logs) - len(done),
        "duration": run.duration,
        "total_input_tokens": num_inputs,
        "total_output_tokens": num_outputs,
        "total_cached_tokens": sum(log.num_cached_tokens for log in done),
        **rates,
        **peaks(done),
        **latencies,
    }


def latency_samples(run: Run, name: str) -> list[float]:
    """One of LATENCIES over a run's completed requests, in milliseconds; ITL is pooled, and
    requests without a TPOT are left out."""
    if name == "itl":
        return [1e3 * gap for log in run.completed for gap in log.itl]
    values = [getattr(log, name) for log in run.completed]
    return [1e3 * value for value in values if value is not None]


def _statistics(
    name: str, samples: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    """Mean, median, population std, and percentiles with linear interpolation."""
    values: dict[str, float | None] = {
        f"{kind}_{name}_ms": None for kind in ("mean", "median", "std")
    }
    values |= {f"p{p:g}_{name}_ms": None for p in percentiles}
    if samples:
        kinds = [np.mean(samples), np.median(samples), np.std(samples)]
        kinds += [np.percentile(samples, p) for p in percentiles]
        values = dict(zip(values, map(float, kinds), strict=True))
    return values


def is_good(log: RequestLog, limits: Mapping[str, float]) -> bool:
    """Whether a request meets every limit (ms). Without a second token its TPOT counts as 0."""
    return all(1e3 * (getattr(log, name) or 0.0) <= limit for name, limit in limits.items())


def peaks(logs: Sequence[RequestLog]) -> dict[str, int]:
    """The most token chunks in one second and the most requests alive in one, seconds being
    counted from the first sending."""
    if not logs:
        return {"max_output_tokens_per_s": 0, "max_concurrent_requests": 0}
    start = min(log.sent for log in logs)
    last = int(max(log.token_times[-1] for log in logs) - start)
    tokens, alive = np.zeros(last + 1, dtype=int), np.zeros(last + 1, dtype=int)
    for log in logs:
        np.add.at(tokens, (np.asarray(log.token_times) - start).astype(int), 1)
        alive[int(log.sent - start) : int(log.token_times[-1] - start) + 1] += 1
    return {
        "max_output_tokens_per_s": int(tokens.max()),
        "max_concurrent_requests": int(alive.max()),
    }


def parse_goodput(texts: Sequence[str] | None) -> dict[str, float] | None:
    """["ttft:500", "tpot:50"] -> limits in milliseconds. ValueError on anything else."""
    return None if texts is None else dict(_parse_limits(texts))


def _parse_limits(texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    for text in texts:
        name, _, number = text.partition(":")
        known = name in GOODPUT_LIMITS and number.replace(".", "", 1).isdecimal()
        if not known:
            names = ", ".join(GOODPUT_LIMITS)
            raise ValueError(f"goodput: {text!r} is not NAME:MILLISECONDS with one of {names}")
        yield name, float(number)
