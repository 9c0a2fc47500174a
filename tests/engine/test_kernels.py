"""The engine with Triton kernels draws what it draws with plain torch."""

import pytest
from triton import knobs

from ernie_engine import SamplingParams
from ernie_engine.kernels.registry import IMPLEMENTATIONS
from tests.tiny import open_engine, token_ids

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
# Without a GPU kernels are interpreted: some tokens must do.
PROMPTS, NUM_TOKENS = ([[5, 6, 7]], 2) if DEVICE == "cpu" else ([[5, 6, 7], [9] * 40], 40)
WITHOUT_KERNEL = [op for op, names in IMPLEMENTATIONS.items() if "triton" not in names]

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "frequency_penalty": 0.4, "seed": 7},
    ],
    ids=["greedy", "sampled"],
)
def test_equal_tokens(tiny, sampling):
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)
    kernels = ",-".join(["triton", *WITHOUT_KERNEL])
    tokens, logprobs = [], []
    for chosen in ("torch", kernels):
        with open_engine(tiny, device=DEVICE, kernels=chosen) as engine:
            outputs = engine.generate(PROMPTS, params)
        tokens.append(token_ids(outputs))
        logprobs.append(scores(outputs))
    assert tokens[0] == tokens[1]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def scores(outputs):
    """All log-probabilities that were asked for, in the order of places and ids."""
    places = [at for output in outputs for c in output.outputs for at in c.logprobs or ()]
    return [at[token].logprob for at in places for token in sorted(at)]
