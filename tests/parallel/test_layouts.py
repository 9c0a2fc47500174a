"""Every layout of ranks gives the tokens of one process: chunked, cached, preempted, aborted."""

from dataclasses import replace

import pytest
import torch

from ernie_engine import Engine, EngineDeadError, SamplingParams
from ernie_engine.testing.checkpoints import write_checkpoint
from tests.parallel.layouts import assert_same, busy_day, small_engine
from tests.tiny import SPEC, open_engine

# Untied, with a vocabulary and layers that do not divide; one K/V head; no shared experts.
ODD = replace(
    SPEC,
    vocab_size=331,
    num_layers=5,
    tie_embeddings=False,
    num_kv_heads=1,
    num_shared_experts=0,
    first_moe_layer=2,
    tokenizer=False,
)


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("odd"), ODD)


@pytest.fixture(scope="session")
def expected(tiny, odd):
    """What one process answers."""
    answers = {}
    for name, folder in (("tiny", tiny), ("odd", odd)):
        with small_engine(folder) as engine:
            answers[name] = busy_day(engine)
    return answers


def check(folder, expected, **layout) -> None:
    with small_engine(folder, debug=True, **layout) as engine:
        found = busy_day(engine)
        scheduler = engine._core.scheduler
        is_shallow = layout.get("max_steps_in_flight") == 1  # too few run at once
        assert is_shallow or scheduler.counters.num_preemptions > 0
        assert sum(output.num_cached_tokens for output in found[1]) > 0
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert_same(found, expected)


def test_two_ranks_a_stage_and_two_stages(tiny, expected):
    check(tiny, expected["tiny"], tp=2, pp=2)


LAYOUTS = {
    "tp2": {"tp": 2},
    "tp4, K/V heads copied": {"tp": 4},
    "pp2": {"pp": 2},
    "pp2, deep": {"pp": 2, "max_steps_in_flight": 5},
    "pp2, shallow": {"pp": 2, "max_steps_in_flight": 1},
    "pp3, uneven": {"pp": 3},
    "pp4, stages of one layer": {"pp": 4},
    "ep2": {"tp": 2, "enable_expert_parallel": True},
    "ep2 pp2": {"tp": 2, "pp": 2, "enable_expert_parallel": True},
    "tp2, two steps in flight": {"tp": 2, "max_steps_in_flight": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tiny, odd, expected, layout, checkpoint):
    folder = {"tiny": tiny, "odd": odd}[checkpoint]
    check(folder, expected[checkpoint], **LAYOUTS[layout])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2, deep", "ep2"])
def test_layouts_on_two_gpus(tiny, monkeypatch, layout):
    monkeypatch.setenv("ERNIE_TEST_DEVICE", "cuda")
    with small_engine(tiny) as engine:
        expected = busy_day(engine)
    check(tiny, expected, **LAYOUTS[layout])


@pytest.mark.slow
def test_unseeded_draws_are_those_of_one_rank_on_all(tiny):
    """With debug each step compares the tokens of a stage's ranks."""
    params = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)
    with open_engine(tiny, tensor_parallel_size=2, debug=True) as engine:
        answers = engine.generate([[5, 6, 7]] * 4, params, use_tqdm=False)
    assert len({tuple(a.outputs[0].token_ids) for a in answers}) == 4


@pytest.mark.slow
def test_one_engine_after_another_and_bad_input_between(tiny):
    for size in (2, 1, 2):
        with open_engine(tiny, tensor_parallel_size=size) as engine:
            with pytest.raises(ValueError, match="out of vocabulary"):
                engine.generate([10**6])
            assert engine.generate([[5, 6]], use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(EngineDeadError):
        engine.generate([[5, 6]])


@pytest.mark.slow
def test_a_rank_that_cannot_serve_is_named(tiny):
    """The cache is too small for one request: an error of the user's, told by rank 0."""
    with pytest.raises(ValueError, match="max_model_len=512 needs 32 K/V blocks"):
        open_engine(tiny, tensor_parallel_size=2, kv_cache_memory_bytes=10_000)
    with open_engine(tiny, tensor_parallel_size=2) as engine:
        assert isinstance(engine, Engine)
