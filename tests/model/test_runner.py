"""ModelRunner on plans written by hand: which rows are drawn from and scored, and with what."""

from dataclasses import replace

import pytest
import torch

from ernie_engine.engine.plan import (
    NO_LOGPROBS,
    NewSlot,
    SamplingPart,
    SamplingSpec,
    StepPlan,
    StepResult,
)
from ernie_engine.engine_config import EngineConfig
from ernie_engine.model import forward as forward_module
from ernie_engine.model import runner as runner_module
from ernie_engine.model import sampler as sampler_module
from ernie_engine.model.runner import ModelRunner
from ernie_engine.model.startup import describe, open_model

GREEDY = SamplingSpec(temperature=0.0)
SCORED = SamplingSpec(num_prompt_logprobs=2)
BLOCKS = 10  # of 16 tokens, for each slot of its own


@pytest.fixture(scope="module")
def opened(tiny) -> ModelRunner:
    config = EngineConfig(model=str(tiny), device="cpu", max_num_seqs=6)
    return open_model(describe(config))


@pytest.fixture
def runner(opened) -> ModelRunner:
    """As just started, but for K/V that nothing may read."""
    opened.kv._data.fill_(torch.nan)
    state = opened.state
    for memory in (state.specs, state.host_prompt_lens, state.num_blocks):
        memory.clear()
    return opened


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 700, (length,), generator=generator).tolist()


def plan(
    rows: dict[int, int],  # slot -> query tokens, single ones first
    new: dict[int, tuple[list[int], SamplingSpec]],
    part: SamplingPart,
    freed: tuple[int, ...] = (),
) -> StepPlan:
    """A step in which each slot of `new` begins, with all the blocks it will ever have."""
    counts = [BLOCKS if slot in new else 0 for slot in rows]
    ids = [BLOCKS * slot + i for slot, n in zip(rows, counts, strict=True) for i in range(n)]
    slots = [NewSlot(slot, *what) for slot, what in new.items()]
    starts = [(slot, 0) for slot in new]
    sizes = list(rows), list(rows.values()), counts, ids
    return StepPlan(0, freed, (), slots, starts, *sizes, part)


def run(runner: ModelRunner, step: StepPlan) -> tuple[StepResult, torch.Tensor]:
    """The step's result, and the logits [T, V] of all its tokens."""
    runner.launch(step)
    assert runner._launched is not None
    hidden = runner._launched[1].hidden
    result = runner.sample(step.sampling).wait()
    with torch.inference_mode():
        return result, runner.model.logits(hidden)


def test_each_sampled_row_is_drawn_from_its_last_token(runner):
    lengths = {3: 1, 0: 5, 2: 9, 4: 4}
    new = {slot: (prompt(n, slot), GREEDY) for slot, n in lengths.items()}
    result, logits = run(runner, plan(lengths, new, SamplingPart([0, 2, 3])))
    ends = [0, 1 + 5 + 9 - 1, 1 + 5 + 9 + 4 - 1]
    assert result.token_ids == [[token] for token in logits[ends].argmax(-1).tolist()]
    assert result.logprobs == [[], [], []] and result.prompt_logprobs == []


def test_the_next_step_reads_the_token_that_was_drawn(runner):
    text = prompt(6)
    new = {0: (prompt(9, seed=1), GREEDY), 1: (text, GREEDY)}
    first, _ = run(runner, plan({0: 5, 1: 6}, new, SamplingPart([1])))
    second, _ = run(runner, plan({1: 1, 0: 4}, {}, SamplingPart([0])))
    told = [*text, *first.token_ids[0]]
    again, _ = run(runner, plan({2: 7}, {2: (told, GREEDY)}, SamplingPart([0])))
    assert second.token_ids == again.token_ids


@pytest.fixture
def looked_at(runner, monkeypatch) -> list[tuple[str, int]]:
    """The final norm's and the head's calls, with their rows, in order."""
    found = []

    def noted(name: str):
        op = getattr(runner.model.ops, name)

        def note(x, *rest):
            found.append((name, len(x)))
            return op(x, *rest)

        return note

    both = {name: noted(name) for name in ("rms_norm", "vocab_head")}
    monkeypatch.setattr(runner.model, "ops", replace(runner.model.ops, **both))
    return found


def norm_and_head(*sizes: int) -> list[tuple[str, int]]:
    return [(name, size) for size in sizes for name in ("rms_norm", "vocab_head")]


# Tokens of each row, the rows drawn from, scored tokens by row -> the rows that the final norm and
# the head see, call by call.
LOOKS = {
    "a prompt's middle": ([40], [], {}, []),
    "a prompt's end": ([40], [0], {}, [1]),
    "some of the rows": ([1, 5, 9, 4], [0, 2, 3], {}, [3]),
    "beside a prompt's middle": ([1, 1, 30], [0, 1], {}, [2]),
    "no row": ([1, 5, 9], [], {}, []),
    "a scored prompt": ([51], [0], {0: 50}, [1, 20, 20, 10]),
    "a part of a scored prompt": ([3, 30], [], {1: 7}, [7]),
    "two scored prompts": ([6, 25], [1], {0: 5, 1: 24}, [1, 5, 20, 4]),
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_head_sees_the_rows_that_are_drawn_from_or_scored(runner, monkeypatch, looked_at, name):
    monkeypatch.setattr(runner_module, "PROMPT_LOGITS_CHUNK", 20)
    counts, drawn, scored, sizes = LOOKS[name]
    new = {slot: (prompt(n, slot), SCORED) for slot, n in enumerate(counts)}
    part = SamplingPart(drawn, list(scored), [0] * len(scored), list(scored.values()))
    runner.launch(plan(dict(enumerate(counts)), new, part))
    assert looked_at == []
    runner.sample(part).wait()
    assert looked_at == norm_and_head(*sizes)


@pytest.mark.parametrize(("most", "launched", "sampled"), [(3, [3], []), (2, [], [3])])
def test_of_few_single_tokens_the_forward_pass_gives_the_logits(
    runner, monkeypatch, looked_at, most, launched, sampled
):
    """A graph can hold them; of more rows they are left to who draws."""
    monkeypatch.setattr(forward_module, "MOST_LOGITS", most)
    new = {slot: (prompt(1, slot), GREEDY) for slot in range(3)}
    part = SamplingPart(range(3))
    runner.launch(plan(dict.fromkeys(range(3), 1), new, part))
    assert looked_at == norm_and_head(*launched)
    looked_at.clear()
    runner.sample(part).wait()
    assert looked_at == norm_and_head(*sampled)


def test_a_decode_step_of_the_same_rows_draws_without_a_word_from_the_host(runner, monkeypatch):
    penalised = SamplingSpec(temperature=0.8, top_p=0.9, presence_penalty=0.5, bias_ids=(7,))
    specs = {2: GREEDY, 0: replace(penalised, bias_values=(1.0,)), 4: GREEDY}
    new = {slot: (prompt(5, slot), spec) for slot, spec in specs.items()}
    part, decode = SamplingPart([0, 1, 2]), dict.fromkeys(specs, 1)
    run(runner, plan(dict.fromkeys(specs, 5), new, part))
    run(runner, plan(decode, {}, part))

    def refuse(*_):
        raise AssertionError("a copy from the host")

    runner.launch(plan(decode, {}, part))
    monkeypatch.setattr(runner_module, "to_device", refuse)
    monkeypatch.setattr(sampler_module, "to_device", refuse)
    assert len(runner.sample(part).wait().token_ids) == 3


def test_a_slot_given_away_keeps_nothing_of_its_last_request(runner):
    bias = SamplingSpec(temperature=0.0, bias_ids=(9,), bias_values=(100.0,), num_logprobs=2)
    run(runner, plan({1: 50}, {1: (prompt(50, 1), bias)}, SamplingPart([0])))
    text = prompt(7, seed=2)
    reused = plan({1: 7}, {1: (text, GREEDY)}, SamplingPart([0]), freed=(1,))
    fresh = plan({2: 7}, {2: (text, GREEDY)}, SamplingPart([0]))
    (one, _), (two, _) = run(runner, reused), run(runner, fresh)
    assert one == two and one.token_ids != [[9]]


def test_log_probabilities_are_of_the_raw_logits(runner):
    spec = SamplingSpec(
        temperature=0.0,
        repetition_penalty=3.0,
        presence_penalty=2.0,
        bias_ids=(77,),
        bias_values=(100.0,),
        num_logprobs=4,
    )
    result, logits = run(runner, plan({0: 8}, {0: (prompt(8), spec)}, SamplingPart([0])))
    expected, ((score,),) = logits[-1].log_softmax(-1), result.logprobs
    assert result.token_ids == [[77]] != [[expected.argmax()]]
    assert score.logprob == pytest.approx(expected[77].item(), abs=1e-5)
    assert score.rank == 1 + (expected > expected[77]).sum()
    assert score.top_ids == expected.topk(4).indices.tolist()
    assert score.top_logprobs == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_every_row_gets_as_many_alternatives_as_it_asked_for(runner):
    wanted = [2, NO_LOGPROBS, 0, 5]
    new = {
        slot: (prompt(4, slot), SamplingSpec(temperature=0.0, num_logprobs=count))
        for slot, count in enumerate(wanted)
    }
    rows = dict.fromkeys(new, 4)
    result, logits = run(runner, plan(rows, new, SamplingPart(range(4))))
    best = logits[3::4].topk(5).indices.tolist()
    for row, (count, scores) in enumerate(zip(wanted, result.logprobs, strict=True)):
        assert len(scores) == (count != NO_LOGPROBS)
        for score in scores:
            assert score.top_ids == best[row][:count] and len(score.top_logprobs) == count
            assert score.rank == 1 and result.token_ids[row] == best[row][:1]


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 1000])
def test_a_prompt_is_scored_in_chunks_and_the_chunks_do_not_show(runner, monkeypatch, chunk):
    model_class, calls = type(runner.model), []
    logits = model_class.logits

    def counted(model, hidden):
        calls.append(len(hidden))
        return logits(model, hidden)

    new, part = {0: (prompt(51), SCORED)}, SamplingPart((), [0], [0], [50])
    whole, _ = run(runner, plan({0: 51}, new, part))
    monkeypatch.setattr(runner_module, "PROMPT_LOGITS_CHUNK", chunk)
    monkeypatch.setattr(model_class, "logits", counted)
    runner.launch(plan({0: 51}, new, part, freed=(0,)))
    cut = runner.sample(part).wait()
    assert max(calls) <= chunk and sum(calls) == 50
    for a, b in zip(cut.prompt_logprobs[0], whole.prompt_logprobs[0], strict=True):
        assert (a.rank, a.top_ids) == (b.rank, b.top_ids) and len(a.top_ids) == 2
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_the_offset_and_count_of_each_row_are_scored(runner, monkeypatch):
    """Three rows; of the middle one nothing, of the others a part."""
    texts = {slot: prompt(n, slot) for slot, n in ((0, 12), (1, 6), (2, 20))}
    new = {slot: (text, SCORED) for slot, text in texts.items()}
    rows = {slot: len(text) for slot, text in texts.items()}
    part = SamplingPart((), [0, 2], [3, 0], [5, 19])
    result, logits = run(runner, plan(rows, new, part))
    expected, found = logits.log_softmax(-1), result.prompt_logprobs
    for got, slot, first, start, count in ((found[0], 0, 0, 3, 5), (found[1], 2, 18, 0, 19)):
        assert len(got) == count
        for i, score in enumerate(got, start):
            logprobs, following = expected[first + i], texts[slot][i + 1]
            assert score.logprob == pytest.approx(logprobs[following].item(), abs=1e-5)
            assert score.rank == 1 + (logprobs > logprobs[following]).sum()


def test_a_prompt_read_in_two_steps_is_scored_to_its_end(runner):
    text = prompt(20)
    new = {0: (text, SCORED)}
    whole, _ = run(runner, plan({0: 20}, new, SamplingPart((), [0], [0], [19])))
    first, _ = run(runner, plan({0: 8}, new, SamplingPart((), [0], [0], [8]), freed=(0,)))
    second, _ = run(runner, plan({0: 12}, {}, SamplingPart((), [0], [0], [11])))
    found = [*first.prompt_logprobs[0], *second.prompt_logprobs[0]]
    assert [s.rank for s in found] == [s.rank for s in whole.prompt_logprobs[0]]
