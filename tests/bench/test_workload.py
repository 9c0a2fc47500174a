"""Workloads: exact lengths, ordinary tokens only, one seed, arrivals as asked."""

import numpy as np
import pytest

from ernie_engine.bench.workload import (
    PROFILES,
    WorkloadSpec,
    model_ids,
    plan_requests,
    probe_request,
    usable_ids,
)
from ernie_engine.config import ModelConfig
from ernie_engine.text.tokenizer import load_tokenizer

IDS = usable_ids(50, special_ids={0, 1, 2, 49})


def spec(**fields) -> WorkloadSpec:
    return WorkloadSpec(**{"num_prompts": 200, "max_input_len": 12, "max_output_len": 9, **fields})


def test_lengths_span_what_was_asked_both_ends_included():
    requests = plan_requests(spec(min_input_len=10, min_output_len=7), IDS)
    assert {len(request.prompt) for request in requests} == {10, 11, 12}
    assert {request.output_len for request in requests} == {7, 8, 9}


def test_without_a_minimum_the_length_is_fixed():
    requests = plan_requests(spec(), IDS)
    assert {len(request.prompt) for request in requests} == {12}
    assert {request.output_len for request in requests} == {9}


def test_prompts_hold_ordinary_tokens_only():
    drawn = {token for request in plan_requests(spec(), IDS) for token in request.prompt}
    assert drawn == set(range(3, 49))
    assert all(type(token) is int for token in drawn)  # JSON and the engine want plain integers


def test_the_special_tokens_of_a_checkpoint_are_left_out(tiny):
    tokenizer, config = load_tokenizer(tiny), ModelConfig.from_folder(tiny)
    ids = set(model_ids(config, tokenizer).tolist())
    assert tokenizer is not None
    special = {i for i in range(config.vocab_size) if tokenizer.is_special(i)}
    assert len(special) > 3 and not ids & special
    assert ids | special == set(range(config.vocab_size))
    without = set(model_ids(config, None).tolist())
    assert set(range(config.vocab_size)) - without == {0, 1, 2}


def test_one_seed_one_workload():
    varied = {"min_input_len": 1, "min_output_len": 1, "request_rate": 5.0}
    first, again = (plan_requests(spec(**varied, seed=3), IDS) for _ in range(2))
    assert first == again
    assert plan_requests(spec(**varied, seed=4), IDS) != first


def test_runs_differ_in_their_prompts_alone():
    varied = spec(min_input_len=4, min_output_len=1, request_rate=5.0)
    first, second = plan_requests(varied, IDS, 0), plan_requests(varied, IDS, 1)
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    for a, b in zip(first, second, strict=True):
        assert len(a.prompt) == len(b.prompt)
        assert (a.output_len, a.arrival) == (b.output_len, b.arrival)


def test_the_probe_is_short_and_like_no_request():
    probe = probe_request(spec(max_output_len=500), IDS)
    assert (len(probe.prompt), probe.output_len) == (12, 16)
    assert probe_request(spec(), IDS).output_len == 9
    assert probe.prompt not in [request.prompt for request in plan_requests(spec(), IDS)]


def test_an_infinite_rate_sends_all_at_once():
    assert {request.arrival for request in plan_requests(spec(), IDS)} == {0.0}


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_arrivals_have_the_asked_rate_and_burstiness(burstiness, variation):
    """A gamma distribution of shape k has a mean of 1 / rate, a variation of 1 / sqrt(k)."""
    many = spec(num_prompts=20001, request_rate=8.0, burstiness=burstiness, max_input_len=1)
    arrivals = [request.arrival for request in plan_requests(many, IDS)]
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_the_profile_of_the_seed():
    workload = WorkloadSpec(**PROFILES["seed"])
    assert workload.num_prompts == 128 and workload.is_uniform
    assert workload.bounds("input") == workload.bounds("output") == (1024, 1024)


def test_uniform_means_alike_and_at_once():
    assert spec().is_uniform
    assert not spec(min_input_len=3).is_uniform
    assert not spec(request_rate=1.0).is_uniform


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_prompts", 0),
        ("max_input_len", 0),
        ("min_input_len", 13),
        ("min_output_len", 0),
        ("request_rate", 0.0),
        ("request_rate", float("inf")),
        ("burstiness", -1.0),
        ("burstiness", float("nan")),
        ("seed", -1),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        spec(**{field: value})


def test_what_does_not_fit_the_model_is_refused():
    spec().check_fits(21)
    with pytest.raises(ValueError, match=r"21 is above max_model_len=20"):
        spec().check_fits(20)


def test_a_vocabulary_of_special_tokens_alone_is_refused():
    with pytest.raises(ValueError, match="vocab_size=2"):
        usable_ids(2, {0, 1})
