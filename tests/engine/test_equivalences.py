"""What must not change the tokens: company, chunks, cache hits, preemption, depth, streaming."""

import random

import pytest

from ernie_engine import SamplingParams
from ernie_engine.engine.plan import derived_seed
from tests.tiny import open_engine, token_ids

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=24,
    temperature=0.9,
    top_p=0.95,
    top_k=60,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    ignore_eos=True,
    seed=11,
)
BLOCK_BYTES = 16 * 2 * 4 * 2 * 16 * 4  # of the tiny checkpoint: 4 layers, 2 heads of 16, fp32


def prompts(count: int = 10) -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(700) for _ in range(40)]
    heads = [shared[: rng.choice([0, 16, 40])] for _ in range(count)]
    return [head + [rng.randrange(700) for _ in range(rng.randint(1, 50))] for head in heads]


def params_mix() -> list[SamplingParams]:
    return [GREEDY, SAMPLED] * 5


@pytest.fixture(scope="module")
def alone(tiny):
    """Each prompt answered by itself, with nothing cached: what all others must equal."""
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        pairs = zip(prompts(), params_mix(), strict=True)
        return [token_ids(engine.generate(*pair))[0] for pair in pairs]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_batched_equals_alone_at_every_depth(tiny, alone, depth):
    with open_engine(tiny, max_steps_in_flight=depth) as engine:
        assert token_ids(engine.generate(prompts(), params_mix())) == alone


def test_a_naive_loop_without_cache_agrees(tiny, alone):
    once = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        for index in (0, 2):
            tokens = list(prompts()[index])
            for expected in alone[index][0]:
                tokens += token_ids(engine.generate(tokens, once))[0][0]
                assert tokens[-1] == expected


@pytest.mark.parametrize("budget", [5, 16, 33])
def test_chunked_prefill_equals_whole(tiny, alone, budget):
    with open_engine(tiny, max_num_batched_tokens=budget) as engine:
        assert token_ids(engine.generate(prompts(), params_mix())) == alone


def test_unchunked_prefill_equals_chunked(tiny, alone):
    fields = {"enable_chunked_prefill": False, "max_model_len": 200, "max_num_batched_tokens": 200}
    with open_engine(tiny, **fields) as engine:
        assert token_ids(engine.generate(prompts(), params_mix())) == alone


def test_prefix_hits_equal_misses(tiny, alone):
    with open_engine(tiny) as engine:
        first = engine.generate(prompts(), params_mix())
        again = engine.generate(prompts(), params_mix())
    assert token_ids(first) == token_ids(again) == alone
    cached = [output.num_cached_tokens for output in again]
    assert cached == [(len(p) - 1) // 16 * 16 for p in prompts()]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preempted_equals_not(tiny, alone, depth):
    fields = {
        "max_model_len": 128,
        "kv_cache_memory_bytes": 12 * BLOCK_BYTES,
        "max_steps_in_flight": depth,
    }
    with open_engine(tiny, **fields) as engine:
        assert engine._core.num_kv_blocks == 12
        assert token_ids(engine.generate(prompts(), params_mix())) == alone
        assert engine._core.scheduler.counters.num_preemptions > 0


def test_three_choices_equal_three_requests_with_the_derived_seeds(tiny):
    prompt = prompts()[0]
    three = SamplingParams(max_tokens=16, n=3, seed=7, ignore_eos=True)
    with open_engine(tiny) as engine:
        choices = token_ids(engine.generate(prompt, three))[0]
        single = [
            SamplingParams(max_tokens=16, seed=derived_seed(7, i), ignore_eos=True)
            for i in range(3)
        ]
        assert token_ids(engine.generate([prompt] * 3, single)) == [[c] for c in choices]
    assert len({tuple(choice) for choice in choices}) == 3


def test_stream_equals_not_stream(tiny):
    params = SamplingParams(max_tokens=20, n=2, seed=3, logprobs=2, ignore_eos=True)
    with open_engine(tiny, max_steps_in_flight=2) as engine:
        whole = engine.generate("The engine", params)[0]
        pieces = list(engine.stream("The engine", params))
    for choice in whole.outputs:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert [t for piece in mine for t in piece.token_ids] == choice.token_ids
        assert "".join(piece.text for piece in mine) == choice.text
        assert [p for piece in mine for p in piece.logprobs] == choice.logprobs
        assert mine[-1].finish_reason == choice.finish_reason == "length"
        assert all(len(piece.token_ids) == 1 for piece in mine)


def test_sampled_tokens_do_not_depend_on_the_company(tiny, alone):
    with open_engine(tiny, enable_prefix_caching=False) as engine:
        for company in range(3):
            others = prompts(20)[10 : 10 + 3 * company]
            asked = [*others, prompts()[1]]
            params = [SamplingParams(max_tokens=30)] * len(others) + [SAMPLED]
            assert token_ids(engine.generate(asked, params))[-1] == alone[1]


def test_an_unseeded_request_draws_anew(tiny):
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with open_engine(tiny) as engine:
        answers = token_ids(engine.generate([prompts()[0]] * 2, params))
    assert answers[0] != answers[1]
