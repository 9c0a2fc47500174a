"""Sampler.draw against a scalar reference in plain Python, over random requests of all kinds."""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from ernie_engine.engine.plan import NewSlot, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.kernels.philox import gumbel_noise
from ernie_engine.kernels.registry import select
from ernie_engine.model import sampler as sampler_module
from ernie_engine.model.sampler import Sampler, read_rows
from ernie_engine.model.slots import Slots

VOCAB, NUM_SLOTS, MAX_LEN = 23, 12, 40
INF = math.inf


@dataclass
class Text:
    """A slot's request: its prompt, its answer so far, how it samples."""

    prompt: list[int]
    answer: list[int]
    spec: SamplingSpec


def sampler_with(texts: dict[int, Text]) -> Sampler:
    """A sampler whose slots hold `texts`, brought there by a plan and step by step."""
    state = Slots(NUM_SLOTS, MAX_LEN, block_size=4, device="cpu")
    new = [NewSlot(slot, text.prompt, text.spec) for slot, text in texts.items()]
    starts = [(slot, 0) for slot in texts]
    state.apply(StepPlan(0, (), (), new, starts, (), (), (), (), SamplingPart()))
    for slot, text in texts.items():
        at = torch.tensor([slot])
        state.advance_to(at, torch.tensor([len(text.prompt)]))
        for token in text.answer:
            state.write(at, state.next_positions(at), torch.tensor([token]))
            state.advance_to(at, state.next_positions(at) + 1)
    return Sampler(select("torch", "cpu"), state)


def draw(texts: dict[int, Text], logits: torch.Tensor) -> list[int]:
    """One token for each row of `logits`; row i belongs to the i-th of `texts`."""
    slots = list(texts)
    sampler, at = sampler_with(texts), torch.tensor(slots)
    return sampler.draw(logits, slots, at, sampler.state.next_positions(at)).tolist()


def adjusted(text: Text, z: list[float]) -> list[float]:
    """Bans, biases, penalties: what a greedy request takes the largest of."""
    spec, z = text.spec, list(z)
    if len(text.answer) < spec.min_tokens:
        for token in spec.banned_ids:
            z[token] = -INF
    for token, bias in zip(spec.bias_ids, spec.bias_values, strict=True):
        z[token] += bias
    counts = Counter(text.answer)
    for token in {*text.prompt, *text.answer}:
        r = spec.repetition_penalty
        z[token] = z[token] / r if z[token] > 0 else z[token] * r
        z[token] -= spec.frequency_penalty * counts[token]
        z[token] -= spec.presence_penalty * (counts[token] > 0)
    return z


def reference(text: Text, z: list[float]) -> int:
    """The token that `text` draws from the logits `z`; equal ones go to the lower id."""
    spec, z = text.spec, adjusted(text, z)
    order = sorted(range(VOCAB), key=lambda token: -z[token])
    if spec.temperature == 0:
        return order[0]
    weights = [math.exp((value - z[order[0]]) / spec.temperature) for value in z]
    kept = [token for token in order if weights[token] >= max(spec.min_p, 1e-300)]
    kept = kept[: spec.top_k or None]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if not nucleus or before / total < spec.top_p:
            nucleus.append(token)
        before += weights[token]
    position = torch.tensor([len(text.prompt) + len(text.answer)])
    noise = gumbel_noise(torch.tensor([spec.seed]), position, VOCAB)[0].tolist()
    return max(nucleus, key=lambda token: math.log(weights[token]) + noise[token])


def random_text(rng: random.Random, best: list[int]) -> Text:
    """`best`: the likeliest tokens of its row, so that bans and penalties matter."""

    def some(low: int, high: int) -> list[int]:
        pool = best + list(range(VOCAB))
        return [rng.choice(pool) for _ in range(rng.randint(low, high))]

    def value(neutral: float, *others: float) -> float:
        return rng.choice([neutral, *others])

    prompt, answer = some(1, 9), some(0, 9)
    biased = rng.sample(range(VOCAB), rng.choice([0, 0, 3]))
    spec = SamplingSpec(
        temperature=value(0.0, 0.0, 0.6, 1.5),
        top_p=value(1.0, 1.0, 0.9, 0.4),
        min_p=value(0.0, 0.0, 0.05, 0.3),
        repetition_penalty=value(1.0, 1.0, 1.6, 0.7),
        presence_penalty=value(0.0, 0.0, 0.9, -0.8),
        frequency_penalty=value(0.0, 0.0, 0.45, -0.35),
        top_k=rng.choice([0, 0, 1, 3, VOCAB + 5]),
        seed=rng.randrange(-(1 << 63), 1 << 63),
        min_tokens=rng.choice([0, max(0, len(answer) + rng.randint(-1, 1))]),
        banned_ids=tuple({best[0], rng.choice(best)}),
        bias_ids=tuple(biased),
        bias_values=tuple(rng.choice([-3.0, 1.5, 4.0]) for _ in biased),
    )
    return Text(prompt, answer, spec)


@pytest.mark.parametrize("seed", range(60))
def test_draws_agree_with_the_reference(seed):
    rng = random.Random(seed)
    logits = 2.5 * torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(seed))
    best = logits.topk(4).indices.tolist()
    slots = rng.sample(range(NUM_SLOTS), 8)  # in any order, and not the row's index
    texts = {slot: random_text(rng, row) for slot, row in zip(slots, best, strict=True)}
    pairs = zip(texts.values(), logits.tolist(), strict=True)
    before = logits.clone()
    assert draw(texts, logits) == [reference(*pair) for pair in pairs]
    assert torch.equal(logits, before)  # raw logits are wanted for log-probabilities


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, 3),
        ({"repetition_penalty": 2.0}, 2),  # 3 stands in the prompt, 4 in the answer
        ({"presence_penalty": 2.0}, 3),  # of answers only
        ({"presence_penalty": -1.5}, 4),
        ({"frequency_penalty": -0.4}, 5),  # 5 was generated twice, last
        ({"bias_ids": (0,), "bias_values": (9.0,)}, 0),
        ({"banned_ids": (3,)}, 3),
        ({"banned_ids": (3,), "min_tokens": 3}, 3),  # three tokens are there already
        ({"banned_ids": (3,), "min_tokens": 4}, 4),
        ({"banned_ids": (3,), "min_tokens": 4, "bias_ids": (3,), "bias_values": (100.0,)}, 4),
    ],
    ids=str,
)
def test_each_value_alone(fields, expected):
    #                        0    1    2    3    4    5
    logits = torch.tensor([[0.0, 0.0, 2.8, 4.0, 3.5, 3.3] + [-9.0] * (VOCAB - 6)])
    text = Text([3, 1], [5, 4, 5], SamplingSpec(temperature=0.0, **fields))
    assert draw({4: text}, logits) == [expected] == [reference(text, logits[0].tolist())]


@pytest.mark.parametrize("field, value", [("top_k", 1), ("top_p", 0.01), ("min_p", 1.0)])
def test_a_filter_that_leaves_one_token_makes_the_draw_certain(field, value):
    logits = torch.linspace(0.0, 0.1, VOCAB)[None].repeat(NUM_SLOTS, 1)
    free, bound = SamplingSpec(), SamplingSpec(**{field: value})

    def tokens(spec: SamplingSpec) -> set[int]:
        texts = {seed: Text([1], [], replace(spec, seed=seed)) for seed in range(NUM_SLOTS)}
        return set(draw(texts, logits))

    assert tokens(bound) == {VOCAB - 1} and len(tokens(free)) > 3


def test_log_probabilities_are_ordered_and_of_the_logits_given():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([4, 0, 22])
    found = sampler_with({}).logprobs(logits, tokens, 5)
    expected = logits.log_softmax(-1)
    assert torch.equal(found.logprob, expected[torch.arange(3), tokens])
    assert torch.equal(found.top_ids, logits.topk(5).indices)
    assert torch.equal(found.rank, (logits >= logits.gather(1, tokens[:, None])).sum(-1))


def test_rows_are_read_once_for_as_many_steps_as_they_stay(monkeypatch):
    reads = []

    def counted(*args):
        reads.append(args)
        return read_rows(*args)

    monkeypatch.setattr(sampler_module, "read_rows", counted)
    greedy = SamplingSpec(temperature=0.0)
    texts = {3: Text([1], [], greedy), 5: Text([2], [], replace(greedy, presence_penalty=1.0))}
    sampler = sampler_with(texts)

    def step(slots: list[int]) -> int:
        at = torch.tensor(slots)
        logits = torch.zeros(len(slots), VOCAB)
        sampler.draw(logits, slots, at, sampler.state.next_positions(at))
        return len(reads)

    assert [step([3, 5]), step([3, 5]), step([5, 3]), step([5]), step([5])] == [1, 1, 2, 3, 3]


def test_reading_rows_tells_who_asks_for_what():
    plain, banned = SamplingSpec(), SamplingSpec(min_tokens=2, banned_ids=(5, 6))
    biased = SamplingSpec(bias_ids=(3,), bias_values=(1.5,), frequency_penalty=0.1)
    specs = {4: plain, 2: banned, 0: biased}
    sampler = sampler_with({slot: Text([1], [], spec) for slot, spec in specs.items()})
    slots = list(specs)
    rows = read_rows(sampler.state, slots, list(specs.values()), torch.tensor(slots))
    assert rows.banned is not None and rows.banned.tolist() == [[1, 1], [5, 6]]
    assert rows.biased is not None and rows.biased.tolist() == [[2], [3]]
    assert rows.biases is not None and rows.biases.tolist() == [1.5]
    assert rows.penalised is not None and rows.penalised.tolist() == [2]
    assert rows.values["min_tokens"].tolist() == [0, 2, 0] and rows.change_logits
    nothing = read_rows(sampler.state, [4], [plain], torch.tensor([4]))
    assert not nothing.change_logits and nothing.banned is None is nothing.biases


def test_a_slot_that_went_to_another_request_is_read_again():
    sampler, at = sampler_with({0: Text([1], [], SamplingSpec(temperature=0.0))}), torch.tensor([0])
    logits = torch.tensor([[0.0, 1.0, 2.0] + [-9.0] * (VOCAB - 3)])

    def next_token() -> int:
        return sampler.draw(logits, [0], at, sampler.state.next_positions(at)).item()

    assert next_token() == 2
    biased = SamplingSpec(temperature=0.0, bias_ids=(1,), bias_values=(5.0,))
    other = [NewSlot(0, [4, 4], biased)]
    sampler.state.apply(StepPlan(1, (0,), (), other, [(0, 0)], (), (), (), (), SamplingPart()))
    assert next_token() == 1
