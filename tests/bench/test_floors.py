"""The arithmetic of floors against figures worked out apart from this code, for one H200."""

from pathlib import Path

import pytest
import torch

from ernie_engine.bench.ceilings import measure_ceilings
from ernie_engine.bench.floors import (
    Ceilings,
    Work,
    decode_work,
    expected_experts,
    generation_seconds,
    kv_bytes_per_token,
    mean_context,
    prefill_work,
)
from ernie_engine.bench.serving import ceiling_throughput
from ernie_engine.bench.workload import PROFILES, WorkloadSpec
from ernie_engine.config import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
H200 = Ceilings(bytes_per_s=4.47e12, flops_per_s=804e12)


def config(name: str) -> ModelConfig:
    return ModelConfig.from_folder(CONFIGS / name)


MOE = config("ernie-4.5-21b-a3b")


@pytest.mark.parametrize(
    ("batch", "prompt_len", "num_tokens", "gigabytes", "milliseconds"),
    [
        (1, 128, 256, 6.7, 1.50),
        (8, 128, 256, 25, 5.6),
        (32, 128, 256, 42, 9.5),
        (128, 128, 256, 45, 10.1),
        (256, 128, 256, 47, 10.5),
        (1, 32000, 64, 8.6, 1.9),
        (32, 8000, 64, 57, 12.7),
    ],
)
def test_decode_floors_of_the_21b_model(batch, prompt_len, num_tokens, gigabytes, milliseconds):
    work = decode_work(MOE, batch, mean_context(prompt_len, num_tokens), itemsize=2)
    assert work.num_bytes / 1e9 == pytest.approx(gigabytes, rel=0.012)
    assert 1e3 * work.seconds(H200) == pytest.approx(milliseconds, rel=0.012)
    assert work.bound(H200) == "memory"


def test_prefill_floor_of_the_21b_model():
    """6.2 GFLOP a token without attention, so about 129,000 tokens a second."""
    work = prefill_work(MOE, batch=16, prompt_len=1024, itemsize=2)
    num_tokens, pairs = 16 * 1024, 16 * 1024 * 1025 / 2
    attention = pairs * 28 * 4 * 20 * 128
    head = 16 * 2 * 103424 * 2560
    assert (work.flops - attention - head) / num_tokens == pytest.approx(6.2e9, rel=0.01)
    assert num_tokens / work.seconds(H200) == pytest.approx(129e3, rel=0.03)
    assert work.bound(H200) == "compute"


def test_a_short_prefill_is_bound_by_its_weights():
    work = prefill_work(MOE, batch=1, prompt_len=128, itemsize=2)
    assert work.bound(H200) == "memory"
    assert work.num_bytes == pytest.approx(43.6e9, rel=0.01)


def test_ceiling_of_the_seed_profile():
    """A step reads 43.7 GB of weights and 11.3 GB of K/V; with the prefill 9,640 tokens/s."""
    work = decode_work(MOE, 128, mean_context(1024, 1024), itemsize=2)
    assert work.num_bytes == pytest.approx(55.0e9, rel=0.005)
    seconds = generation_seconds(MOE, 128, 1024, 1024, "bfloat16", H200)
    assert 128 * 1024 / seconds == pytest.approx(9640, rel=0.01)
    profile = WorkloadSpec(**PROFILES["seed"])
    ceiling = ceiling_throughput(profile, 256, MOE, "bfloat16", H200)
    assert ceiling == pytest.approx(9640, rel=0.01)


def test_no_ceiling_where_the_batches_are_not_known():
    def ceiling(max_num_seqs: int, **fields):
        spec = WorkloadSpec(num_prompts=8, max_input_len=16, max_output_len=4, **fields)
        return ceiling_throughput(spec, max_num_seqs, MOE, "bfloat16", H200)

    assert ceiling(8) is not None
    assert ceiling(7) is None
    assert ceiling(8, request_rate=1.0) is None
    assert ceiling(8, min_output_len=1) is None


def test_expected_experts():
    assert expected_experts(MOE, 1) == pytest.approx(6)
    assert expected_experts(MOE, 32) == pytest.approx(61.3, abs=0.1)
    assert expected_experts(MOE, 10**5) == pytest.approx(64)
    assert expected_experts(config("ernie-4.5-0.3b"), 32) == 0


def test_a_dense_model_by_hand():
    """0.3B: 18 layers of q, o 1024 x 2048, k, v 1024 x 256, MLP 3 x 1024 x 3072; a tied head."""
    dense = config("ernie-4.5-0.3b")
    layers = 18 * (2 * 1024 * 2048 + 2 * 1024 * 256 + 3 * 1024 * 3072)
    head = 103424 * 1024
    work = decode_work(dense, batch=2, context=10, itemsize=2)
    assert kv_bytes_per_token(dense, 2) == 2 * 18 * 2 * 128 * 2
    assert work.num_bytes == 2 * (layers + head) + 20 * 18432
    assert work.flops == 2 * 2 * (layers + head) + 20 * 18 * 4 * 16 * 128


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("ernie-4.5-0.3b", 0.36e9, 0.36e9),
        ("ernie-4.5-21b-a3b", 21.8e9, 3.3e9),
        ("ernie-4.5-21b-a3b-thinking", 21.8e9, 3.3e9),
        ("ernie-4.5-300b-a47b", 299e9, 47e9),
    ],
)
def test_the_released_geometries_weigh_what_their_names_say(name, total, active):
    """A step of very many tokens reads every weight; one token's operations tell the active ones
    (the head counts as active, the embedding of an untied model as neither)."""
    model = config(name)
    every = decode_work(model, batch=10**6, context=0, itemsize=2).num_bytes / 2
    one = decode_work(model, batch=1, context=0, itemsize=2).flops / 2
    assert every == pytest.approx(total, rel=0.02)
    assert one == pytest.approx(active, rel=0.03)


def test_the_tighter_ceiling_counts():
    ceilings = Ceilings(bytes_per_s=10.0, flops_per_s=1000.0)
    assert Work(20.0, 1000.0).seconds(ceilings) == 2.0
    assert Work(20.0, 3000.0).seconds(ceilings) == 3.0
    assert Work(20.0, 3000.0).bound(ceilings) == "compute"


def test_ceilings_can_be_measured_here():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < ceilings.bytes_per_s < 1e13
    assert 1e8 < ceilings.flops_per_s < 1e15
