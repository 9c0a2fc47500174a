"""Every figure against event logs made by hand, so that each definition can be checked on paper."""

import pytest

from ernie_engine.bench.metrics import (
    RequestLog,
    Run,
    figures,
    is_good,
    latency_samples,
    parse_goodput,
    peaks,
)

# sent at 10: first token after 0.5 s, then gaps of 0.1, 0.1, 0.3; 4 tokens in 4 chunks
A = RequestLog(10.0, [10.5, 10.6, 10.7, 11.0], num_input_tokens=7, num_output_tokens=4)
# sent at 10.2: two chunks carry three tokens
B = RequestLog(10.2, [10.4, 11.2], num_input_tokens=5, num_output_tokens=3)
# a single token: no TPOT, no gap
ONE = RequestLog(11.0, [11.9], num_input_tokens=3, num_output_tokens=1)
FAILED = RequestLog(
    10.0, [10.1, 12.0], num_input_tokens=100, num_output_tokens=9, error="status 500"
)


def test_one_request():
    assert A.ttft == pytest.approx(0.5)
    assert A.e2el == pytest.approx(1.0)
    assert A.tpot == pytest.approx(0.5 / 3)
    assert A.itl == pytest.approx([0.1, 0.1, 0.3])


def test_tpot_divides_by_tokens_not_by_chunks():
    assert B.tpot == pytest.approx(0.8 / 2)
    assert B.itl == pytest.approx([0.8])


def test_throughputs_count_what_was_completed_over_the_whole_run():
    result = figures(Run([A, B, ONE, FAILED], duration=4.0))
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (15, 8)
    assert result["request_throughput"] == pytest.approx(3 / 4)
    assert result["output_throughput"] == pytest.approx(8 / 4)
    assert result["total_token_throughput"] == pytest.approx(23 / 4)


def test_ttft_and_e2el_statistics():
    result = figures(Run([A, B, ONE, FAILED], 4.0), percentiles=[50, 75, 99.9])
    # TTFT: 200, 500, 900 ms
    assert result["mean_ttft_ms"] == pytest.approx(1600 / 3)
    assert result["median_ttft_ms"] == pytest.approx(500)
    assert result["std_ttft_ms"] == pytest.approx(286.744, abs=1e-3)  # population, not sample
    assert result["p50_ttft_ms"] == pytest.approx(500)
    assert result["p75_ttft_ms"] == pytest.approx(700)  # linear: half way from 500 to 900
    assert result["p99.9_ttft_ms"] == pytest.approx(500 + 0.998 * 400)
    assert result["mean_e2el_ms"] == pytest.approx((1000 + 1000 + 900) / 3)


def test_itl_is_pooled_over_requests():
    run = Run([A, B, ONE, FAILED], 4.0)
    assert latency_samples(run, "itl") == pytest.approx([100, 100, 300, 800])
    assert figures(run)["median_itl_ms"] == pytest.approx(200)
    assert figures(run)["mean_itl_ms"] == pytest.approx(325)  # a mean of means would be 483


def test_requests_without_a_second_token_have_no_tpot():
    assert latency_samples(Run([A, B, ONE], 4.0), "tpot") == pytest.approx([500 / 3, 400])


def test_what_cannot_be_measured_is_none():
    result = figures(Run([ONE], 1.0))
    assert result["mean_tpot_ms"] is None and result["p99_itl_ms"] is None
    assert result["mean_ttft_ms"] == pytest.approx(900)
    nothing = figures(Run([FAILED], 1.0), goodput={"ttft": 1.0})
    assert nothing["mean_ttft_ms"] is None
    assert nothing["output_throughput"] == nothing["request_goodput"] == 0


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500.1}, True),
        ({"ttft": 499.9}, False),
        ({"tpot": 167}, True),
        ({"tpot": 166}, False),
        ({"e2el": 1000.1, "tpot": 166}, False),  # all must be met
        ({"e2el": 999}, False),
    ],
)
def test_goodput_needs_every_limit(limits, good):
    assert is_good(A, limits) is good


def test_goodput_of_a_single_token_counts_its_tpot_as_0():
    assert is_good(ONE, {"tpot": 0.001})
    result = figures(Run([A, B, ONE, FAILED], 4.0), goodput={"tpot": 200, "ttft": 1000})
    assert result["request_goodput"] == pytest.approx(2 / 4)  # A and ONE
    assert "request_goodput" not in figures(Run([A], 4.0))


def test_peaks_in_seconds_from_the_first_sending():
    early = RequestLog(0.5, [0.6, 1.4, 1.6, 2.5], 1, 4)  # seconds 0, 0, 1, 2
    late = RequestLog(2.4, [2.45, 2.6, 5.4], 1, 3)  # from 1.9: seconds 1, 2, 4
    assert peaks([early, late]) == {"max_output_tokens_per_s": 2, "max_concurrent_requests": 2}
    burst = RequestLog(0.5, [0.6] * 5, 1, 5)
    assert peaks([early, burst])["max_output_tokens_per_s"] == 7
    alone = RequestLog(10.0, [10.5], 1, 1)
    assert peaks([early, alone])["max_concurrent_requests"] == 1
    assert peaks([alone]) == {"max_output_tokens_per_s": 1, "max_concurrent_requests": 1}
    assert peaks([]) == {"max_output_tokens_per_s": 0, "max_concurrent_requests": 0}


def test_goodput_limits_are_read():
    assert parse_goodput(["ttft:500", "tpot:12.5"]) == {"ttft": 500.0, "tpot": 12.5}
    assert parse_goodput(None) is None


@pytest.mark.parametrize("text", ["ttft", "itl:5", "ttft:", "ttft:-1", "ttft:nan", "ttft:1.2.3"])
def test_a_bad_goodput_limit_is_refused(text):
    with pytest.raises(ValueError, match="goodput"):
        parse_goodput([text])
