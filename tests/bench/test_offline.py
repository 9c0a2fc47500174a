"""The offline driver against the tiny engine: every request's tokens, arrivals, concurrency."""

import pytest

from ernie_engine import SamplingParams
from ernie_engine.bench.floors import Ceilings
from ernie_engine.bench.metrics import RequestLog, figures
from ernie_engine.bench.offline import OfflineDriver
from ernie_engine.bench.serving import measure, run_row
from ernie_engine.bench.targets import engine_target
from ernie_engine.bench.workload import GREEDY, PlannedRequest, WorkloadSpec
from tests.tiny import open_engine


@pytest.fixture(scope="module")
def engine(tiny):
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        yield engine


def run(engine, requests, limit=None):
    told: list[RequestLog] = []
    driver = OfflineDriver(engine, SamplingParams(**GREEDY, ignore_eos=True))
    result = driver.run(requests, limit, told.append)
    assert list(result.logs) == told
    return result


def planned(count: int, output_len: int = 5, gap: float = 0.0) -> list[PlannedRequest]:
    return [PlannedRequest([7 + i] * (3 + i), output_len + i, gap * i) for i in range(count)]


def test_every_token_of_every_request_is_in_its_log(engine):
    result = run(engine, planned(6))
    assert sorted((log.num_input_tokens, log.num_output_tokens) for log in result.logs) == [
        (3 + i, 5 + i) for i in range(6)
    ]
    for log in result.logs:
        assert log.error is None and len(log.token_times) == log.num_output_tokens
        assert log.sent < log.token_times[0] and list(log.token_times) == sorted(log.token_times)
        assert log.e2el <= result.duration


def open_at(result, time: float) -> int:
    return sum(log.sent <= time < log.token_times[-1] for log in result.logs)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_concurrency_is_bounded_and_used(engine, limit):
    result = run(engine, planned(6), limit)
    most = max(open_at(result, log.sent) for log in result.logs)
    assert most == (limit or 6)
    assert len({log.sent for log in result.logs}) == (1 if limit is None else 6 - (limit - 1))


def test_requests_are_submitted_at_their_arrivals(engine):
    result = run(engine, planned(4, gap=0.05))
    sent = sorted(log.sent for log in result.logs)
    assert all(at - sent[0] >= 0.04 * i for i, at in enumerate(sent))
    assert result.duration > 0.15


def test_cached_prompt_tokens_are_told(tiny):
    with open_engine(tiny, enable_prefix_caching=True) as engine:
        requests = [PlannedRequest([9] * 40, 2), PlannedRequest([9] * 40, 2)]
        logs = run(engine, requests, limit=1).logs
    assert [log.num_cached_tokens for log in logs] == [0, 32]


def test_a_run_for_each_concurrency(engine):
    spec = WorkloadSpec(num_prompts=5, max_input_len=20, max_output_len=4, min_output_len=2)
    target = engine_target(engine, spec, Ceilings(1e10, 1e10), {**GREEDY, "ignore_eos": True})
    assert target.ceiling is None  # the lengths vary
    rows = []
    for measurement in measure(target.driver, spec, target.ids, [1, None], progress=False):
        rows.append(run_row(measurement, [99], {"ttft": 1e6}))
    assert [row["max_concurrency"] for row in rows] == [1, None]
    for row in rows:
        assert (row["completed"], row["total_input_tokens"]) == (5, 100)
        assert row["total_output_tokens"] == row["asked_output_tokens"]
        assert row["request_goodput"] == row["request_throughput"]
        assert row["errors"] == []


def test_ttft_of_what_waits_for_a_slot_includes_the_waiting(engine):
    """Eight slots, sixteen requests: the second half cannot begin before the first one ends."""
    result = run(engine, [PlannedRequest([5] * 4, 8) for _ in range(16)])
    ttft = sorted(log.ttft for log in result.logs)
    ends = sorted(log.token_times[-1] - log.sent for log in result.logs)
    assert ttft[8] > ends[7] * 0.5 and ttft[0] < ends[0]
    assert figures(result)["max_concurrent_requests"] == 16
