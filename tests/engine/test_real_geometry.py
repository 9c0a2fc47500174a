"""21B-A3B as it is served, with dummy weights in bf16 on one GPU: neither graphs nor overlapped
steps change a token, and a sequence among others says what it says alone.
"""

import gc
import random
from pathlib import Path

import pytest
import torch

from ernie_engine import Engine, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
MODEL = Path(__file__).parents[2] / "configs" / "ernie-4.5-21b-a3b"
NEW_TOKENS = 24
TOLERANCE = 2**-7  # RMS of differences over RMS of log-probabilities, as for bf16 in tests/kernels


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    lengths = [1, 7, 60, 128, 129, 300, 500, 900]
    return [[rng.randrange(103424) for _ in range(n)] for n in lengths]


def params() -> list[SamplingParams]:
    base = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    drawn = {"temperature": 0.8, "top_p": 0.8, "seed": 7}
    return [SamplingParams(**base, **(drawn if i % 2 else {"temperature": 0.0})) for i in range(8)]


def answers(**fields):
    """All prompts together, and each alone."""
    config = {"model": str(MODEL), "load_format": "dummy", "device": "cuda", "max_model_len": 2048}
    with Engine(**config, **fields) as engine:
        among = engine.generate(prompts(), params(), use_tqdm=False)
        pairs = zip(prompts(), params(), strict=True)
        return among, [engine.generate(*pair, use_tqdm=False)[0] for pair in pairs]


@pytest.fixture(scope="module")
def said():
    """The answers of engines that differ in one thing, and of one that has the prompts alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("the weights take 41 GiB")
    found = {}
    for name, fields in (
        ("served", {}),
        ("eager", {"enforce_eager": True}),
        ("one step at a time", {"max_steps_in_flight": 1}),
    ):
        found[name], alone = answers(**fields)
        found.setdefault("alone", alone)
        gc.collect()  # two such engines do not fit
        torch.cuda.empty_cache()
    return found


def tokens_of(answers) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.mark.parametrize("other", ["eager", "one step at a time"])
def test_tokens_are_equal(said, other):
    assert all(len(tokens) == NEW_TOKENS for tokens in tokens_of(said["served"]))
    assert tokens_of(said["served"]) == tokens_of(said[other])


def test_among_others_as_alone(said):
    pairs = []
    for among, alone in zip(said["served"], said["alone"], strict=True):
        both = among.prompt_logprobs[1:], alone.prompt_logprobs[1:]
        for id_, a, b in zip(among.prompt_token_ids[1:], *both, strict=True):
            pairs.append((a[id_].logprob, b[id_].logprob))
        first, same = among.outputs[0], alone.outputs[0]
        for i, (a, b) in enumerate(zip(first.token_ids, same.token_ids, strict=True)):
            if a != b:  # a near tie, or a draw at a border: from here on the texts are two
                break
            pairs.append((first.logprobs[i][a].logprob, same.logprobs[i][b].logprob))
    assert len(pairs) > 2000
    among, alone = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    error = ((among - alone).norm() / alone.norm()).item()
    print(f"relative RMS difference of {len(pairs)} log-probabilities: {error:.5f}")
    assert error < TOLERANCE
