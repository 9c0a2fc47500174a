"""Tokens that come back from the last stage: written where and when a step reads them."""

import torch

from ernie_engine.engine.plan import NewSlot, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.model.promises import Promises
from ernie_engine.model.slots import Slots


class Arrival:
    def __init__(self):
        self.tokens, self.was_waited = None, False

    def wait(self):
        assert self.tokens is not None, "waited for before the last stage could send it"
        self.was_waited = True
        return self.tokens


class FakePipe:
    def __init__(self):
        self.arrivals: list[Arrival] = []

    def expect_tokens(self, count):
        self.arrivals.append(Arrival())
        return self.arrivals[-1]

    def send(self, step, *tokens):
        self.arrivals[step].tokens = torch.tensor(tokens)


def made(most: int = 3) -> tuple[Promises, FakePipe, Slots]:
    pipe, state = FakePipe(), Slots(4, 16, 4, "cpu")
    return Promises(pipe, state, most), pipe, state


def prompts(state: Slots, *lengths: int) -> None:
    new = [NewSlot(i, [9] * n, SamplingSpec()) for i, n in enumerate(lengths)]
    starts = [(i, n) for i, n in enumerate(lengths)]  # as if all were computed
    state.apply(StepPlan(0, (), (), new, starts, (), (), (), (), SamplingPart()))


def test_each_token_is_written_behind_what_was_computed_when_it_is_read():
    promises, pipe, state = made()
    prompts(state, 3, 5, 2)
    promises.expect([0, 1], torch.tensor([0, 1]))
    promises.expect([2], torch.tensor([2]))
    pipe.send(0, 70, 71)
    promises.keep([1])  # step 1 has not come yet, and nobody needs it
    assert state.history[0, 3] == 70 and state.history[1, 5] == 71
    assert not pipe.arrivals[1].was_waited
    pipe.send(1, 72)
    promises.keep([2, 0])
    assert state.history[2, 2] == 72


def test_a_slot_that_was_given_away_keeps_its_new_owners_prompt():
    promises, pipe, state = made()
    prompts(state, 3, 3)
    promises.expect([0, 1], torch.tensor([0, 1]))
    promises.drop([0])  # its request has ended; another one moves in
    state.apply(StepPlan(1, [0], (), [NewSlot(0, [8] * 6, SamplingSpec())], [(0, 0)],
                         (), (), (), (), SamplingPart()))  # fmt: skip
    promises.keep([0])  # reads its own prompt only: waits for nothing
    assert not pipe.arrivals[0].was_waited
    pipe.send(0, 70, 71)
    promises.keep([1])
    assert state.history[0, :6].tolist() == [8] * 6 and state.history[1, 3] == 71


def test_a_preempted_request_gets_its_token_where_it_belongs():
    promises, pipe, state = made()
    prompts(state, 5)
    promises.expect([0], torch.tensor([0]))
    state.apply(StepPlan(1, (), [0], (), [(0, 0)], (), (), (), (), SamplingPart()))
    pipe.send(0, 70)
    promises.keep([0])
    assert state.history[0, 5] == 70 and state.num_computed[0] == 0


def test_what_nobody_reads_does_not_pile_up():
    promises, pipe, state = made(most=2)
    prompts(state, 1, 1, 1)
    for step in range(6):
        promises.expect([step % 3], torch.tensor([step % 3]))
        pipe.send(step, step)
    assert [arrival.was_waited for arrival in pipe.arrivals] == [True] * 4 + [False] * 2
