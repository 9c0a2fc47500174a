"""What /metrics tells: counts and histograms under the names that existing boards know.

Owns the numbers, the buckets and their names. Written on the event loop only, so plain integers
do; labels come from closed sets.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ernie_engine.server.wire import EngineState

_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_GAPS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
_GAPS = (*_GAPS, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_FIRST = (*_FIRST, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_LATENCY = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)
_LATENCY = (*_LATENCY, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)
_FEW = (1, 2, 5, 10, 20, 50, 100)

_HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": _FIRST,
    "inter_token_latency_seconds": _GAPS,
    "request_time_per_output_token_seconds": _GAPS,
    "e2e_request_latency_seconds": _LATENCY,
    "request_queue_time_seconds": _LATENCY,
    "request_prefill_time_seconds": _LATENCY,
    "request_decode_time_seconds": _LATENCY,
    "request_inference_time_seconds": _LATENCY,
    "request_prompt_tokens": _COUNTS,
    "request_generation_tokens": _COUNTS,
    "request_max_num_generation_tokens": _COUNTS,
    "request_params_n": _FEW,
    "request_params_max_tokens": _COUNTS,
    "request_num_preemptions": (0, *_FEW),
    "iteration_tokens_total": (
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        256,
        512,
        1024,
        2048,
        4096,
        8192,
        16384,
    ),
}
_COUNTERS = ("prompt_tokens", "prompt_tokens_cached", "generation_tokens")
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("requests", "tokens", "not_ready", "draining")
_METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE")
OTHER = "other"


class Histogram:
    """Counts of values up to each bound; as cheap as it can be, for it is fed every token."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = sorted(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, how many values are not above it)"""
        so_far, buckets = 0, []
        for bound, count in zip([*map(float, self.bounds), "+Inf"], self.counts, strict=True):
            so_far += count
            buckets.append((str(bound), so_far))
        return buckets


class Metrics:
    """`state` is the engine's last word; the rest is counted here."""

    def __init__(self, prefix: str, model_name: str):
        self._prefix, self._labels = prefix, {"model_name": model_name, "engine": "0"}
        self.state = EngineState()
        self.cache_config: Mapping[str, str] = {}
        self.histograms = {name: Histogram(bounds) for name, bounds in _HISTOGRAMS.items()}
        self.counters: dict[str, int] = dict.fromkeys(_COUNTERS, 0)
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected: dict[str, int] = dict.fromkeys(REJECTIONS, 0)
        self.http: Counter[tuple[str, str, str]] = Counter()  # handler, method, status
        self.http_seconds: dict[tuple[str, str], Histogram] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # pyright: ignore[reportArgumentType]
        ProcessCollector(registry=self._registry)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens read and answer tokens drawn, since the start."""
        return self.counters["prompt_tokens"] + self.counters["generation_tokens"]

    def observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """`handler`: a route's own path, or OTHER."""
        method = method if method in _METHODS else OTHER
        self.http[handler, method, str(status)] += 1
        if (handler, method) not in self.http_seconds:
            self.http_seconds[handler, method] = Histogram(_LATENCY)
        self.http_seconds[handler, method].observe(seconds)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    # --- for the registry ---

    def collect(self) -> Iterator[Metric]:
        state = self.state
        used = state.num_used_blocks / state.num_blocks if state.num_blocks else 0.0
        yield self._gauge("num_requests_running", state.num_running)
        yield self._gauge("num_requests_waiting", state.num_waiting)
        yield self._gauge("num_requests_waiting_by_reason", state.num_waiting, reason="capacity")
        yield self._gauge("kv_cache_usage_perc", used)
        yield self._gauge("cache_config_info", 1, **self.cache_config)
        yield self._counter("num_preemptions", state.num_preemptions)
        yield self._counter("prefix_cache_queries", state.num_prompt_tokens)
        yield self._counter("prefix_cache_hits", state.num_cached_tokens)
        yield self._counter("kernel_compilations", state.num_compilations)
        yield self._counter("cuda_graph_captures", state.num_graphs)
        for name, count in self.counters.items():
            yield self._counter(name, count)
        yield self._counters("request_success", "finished_reason", self.finished)
        yield self._counters("admission_rejections", "reason", self.rejected)
        for name, histogram in self.histograms.items():
            yield _histogram(f"{self._prefix}:{name}", [(self._labels, histogram)])
        rows = [
            ({"handler": handler, "method": method, "status": status}, count)
            for (handler, method, status), count in self.http.items()
        ]
        yield _fill(CounterMetricFamily, "http_requests", rows)
        timed = [({"handler": h, "method": m}, t) for (h, m), t in self.http_seconds.items()]
        yield _histogram("http_request_duration_seconds", timed)

    def _gauge(self, name: str, value: float, **labels: str) -> Metric:
        rows = [({**self._labels, **labels}, value)]
        return _fill(GaugeMetricFamily, f"{self._prefix}:{name}", rows)

    def _counter(self, name: str, value: float) -> Metric:
        return _fill(CounterMetricFamily, f"{self._prefix}:{name}", [(self._labels, value)])

    def _counters(self, name: str, label: str, counts: Mapping[str, int]) -> Metric:
        rows = [({**self._labels, label: value}, count) for value, count in counts.items()]
        return _fill(CounterMetricFamily, f"{self._prefix}:{name}", rows)


def _fill(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    rows: Sequence[tuple[Mapping[str, str], float]],
) -> Metric:
    names = list(rows[0][0]) if rows else []
    metric = family(name, _describe(name), labels=names)
    for labels, value in rows:
        metric.add_metric(list(labels.values()), value)
    return metric


def _histogram(name: str, rows: Sequence[tuple[Mapping[str, str], Histogram]]) -> Metric:
    names = list(rows[0][0]) if rows else []
    metric = HistogramMetricFamily(name, _describe(name), labels=names)
    for labels, histogram in rows:
        metric.add_metric(list(labels.values()), histogram.buckets(), histogram.total)
    return metric


def _describe(name: str) -> str:
    return name.split(":")[-1].replace("_", " ")
