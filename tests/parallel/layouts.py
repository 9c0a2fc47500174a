"""A busy day of an engine, told so that two layouts of ranks can be compared."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ernie_engine import Engine, RequestOutput, SamplingParams
from ernie_engine.config import ModelConfig
from ernie_engine.parallel.planner import deal_layers
from tests.tiny import open_engine

NUM_BLOCKS = 16
MAX_LEN = 128
GREEDY = {"temperature": 0.0, "ignore_eos": True, "logprobs": 3}
SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 60,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.3,
    "ignore_eos": True,
    "logprobs": 2,
}


def prompts(vocab_size: int, count: int = 10) -> list[list[int]]:
    """Some begin alike, for prefix hits."""
    rng = random.Random(5)
    shared = [rng.randrange(vocab_size) for _ in range(40)]
    heads = [shared[: rng.choice([0, 16, 40])] for _ in range(count)]
    return [head + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 40))] for head in heads]


def params() -> list[SamplingParams]:
    """Greedy and sampled, some with several choices, some with their prompts scored."""
    mixed = []
    for i in range(10):
        base = {**(GREEDY if i % 2 == 0 else SAMPLED), "seed": 11 + i, "max_tokens": 12 + i}
        if i == 3:
            base["n"] = 3
        if i in (4, 7):
            base["prompt_logprobs"] = 2
        mixed.append(SamplingParams(**base))
    return mixed


def busy_day(engine: Engine) -> list[list[RequestOutput]]:
    """Three rounds: beside requests that are aborted, with all prompts cached, and one alone."""
    asked = prompts(engine.model_config.vocab_size)
    rounds = []
    with _company(engine, asked):
        rounds.append(engine.generate(asked, params(), use_tqdm=False))
    rounds.append(engine.generate(asked, params(), use_tqdm=False))
    alone = SamplingParams(max_tokens=40, **GREEDY)
    rounds.append(engine.generate([asked[2]], alone, use_tqdm=False))
    return rounds


@contextmanager
def _company(engine: Engine, asked: list[list[int]]) -> Iterator[None]:
    """Callers that go away: at once, while their prompt is read, after some tokens."""

    def come_and_go() -> None:
        for num_pieces in (0, 1, 4, 0, 2):
            with engine.stream(asked[num_pieces] + [7] * 20, SamplingParams(max_tokens=60)) as s:
                for _ in range(num_pieces):
                    next(s)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    yield
    thread.join()


@contextmanager
def small_engine(folder: Path, tp: int = 1, pp: int = 1, **fields) -> Iterator[Engine]:
    """Few blocks, so that requests are preempted; few tokens a step, so that prompts are cut."""
    model = ModelConfig.from_folder(folder)
    most_layers = max(len(layers) for layers in deal_layers(model, pp))
    heads = max(1, model.num_key_value_heads // tp)
    block_bytes = 16 * 2 * most_layers * heads * model.head_dim * 4
    with open_engine(
        folder,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        kv_cache_memory_bytes=NUM_BLOCKS * block_bytes,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=33,
        **fields,
    ) as engine:
        assert engine.num_kv_blocks == NUM_BLOCKS
        yield engine


def assert_same(found: list[list[RequestOutput]], expected: list[list[RequestOutput]]) -> None:
    """Equal tokens; log-probabilities within 1e-4."""
    for ours, theirs in zip(found, expected, strict=True):
        for mine, yours in zip(ours, theirs, strict=True):
            for a, b in zip(mine.outputs, yours.outputs, strict=True):
                assert a.token_ids == b.token_ids
                assert a.finish_reason == b.finish_reason
                _assert_near(a.logprobs, b.logprobs)
            _assert_near(mine.prompt_logprobs, yours.prompt_logprobs)


def _assert_near(mine, yours) -> None:
    assert (mine is None) == (yours is None)
    for a, b in zip(mine or [], yours or [], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            common = sorted(set(a) & set(b))
            assert len(common) >= len(a) - 1  # two equally likely ones may change places
            values = [[scores[t].logprob for t in common] for scores in (a, b)]
            torch.testing.assert_close(*map(torch.tensor, values), rtol=0, atol=1e-4)
