"""The engine with Triton kernels says what it says with plain torch."""

import pytest
from triton import knobs

from ernie_engine import SamplingParams
from tests.tiny import open_engine, token_ids

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
# Without a GPU kernels are interpreted: some tokens must do.
NUM_TOKENS, NUM_LONG, BUDGET = (2, 19, 14) if DEVICE == "cpu" else (40, 300, 130)
LONG = [(37 * i) % 700 for i in range(NUM_LONG)]
SHORT = [5, 6, 7]

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
GREEDY = SamplingParams(
    max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0, logprobs=3, prompt_logprobs=1
)
SAMPLED = SamplingParams(
    max_tokens=NUM_TOKENS,
    ignore_eos=True,
    temperature=0.9,
    top_k=40,
    top_p=0.9,
    frequency_penalty=0.4,
    seed=7,
)


def answers(folder, kernels, **fields):
    """Of a prompt in chunks beside a decoding one, then of one that is in the cache."""
    fields = {"device": DEVICE, "max_num_batched_tokens": BUDGET, **fields}
    with open_engine(folder, kernels=kernels, **fields) as engine:
        first = engine.generate([SHORT, LONG], [SAMPLED, GREEDY], use_tqdm=False)
        again = engine.generate([LONG], [SAMPLED], use_tqdm=False)
    assert again[0].num_cached_tokens == NUM_LONG // 16 * 16
    outputs = [*first, *again]
    return token_ids(outputs), [p for output in outputs for p in scores(output)]


def scores(output):
    """All log-probabilities that were asked for, in the order of places and ids."""
    asked = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
    return [(token, at[token].logprob) for at in asked if at for token in sorted(at)]


def check(folder, **fields):
    expected, found = (answers(folder, kernels, **fields) for kernels in ("torch", "triton"))
    assert found[0] == expected[0]
    assert len(expected[1]) >= NUM_LONG + 3 * NUM_TOKENS
    assert [token for token, _ in found[1]] == [token for token, _ in expected[1]]
    assert [p for _, p in found[1]] == pytest.approx([p for _, p in expected[1]], abs=1e-4)


@pytest.mark.timeout(600)
def test_equal_tokens_and_scores(tiny):
    check(tiny)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(DEVICE == "cuda", reason="ranks on one GPU: tests/parallel has them on two")
def test_equal_tokens_and_scores_on_two_ranks_with_their_own_experts(tiny):
    # An interpreted step takes longer than a rank may be silent.
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    check(tiny, **ranks, peer_timeout_seconds=600.0)
