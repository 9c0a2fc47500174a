"""Seeded simulation of the mind: random arrivals, aborts and tiny pools at depths 1 to 3."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_engine.engine.block_pool import BlockPool
from ernie_engine.engine.plan import (
    RecordingRoom,
    SamplingSpec,
    StepPlan,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.engine.scheduler import Limits, Scheduler
from tests.engine.fake_runner import FakeRunner

VOCAB = 50
EOS = 0


def next_token(history: Sequence[int]) -> int:
    """What the imagined model says: a function of the whole history, sometimes the end."""
    return hash(tuple(history)) % VOCAB


def expected_answer(request: Request, prompt: Sequence[int]) -> tuple[list[int], str]:
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.eos_ids:
            return tokens[len(prompt) :], "stop"
        if len(tokens) == request.max_total_tokens:
            return tokens[len(prompt) :], "length"


class Simulation:
    """A loop like the engine's: `depth` steps in flight, results taken in late."""

    def __init__(
        self,
        limits: Limits,
        num_blocks: int,
        depth: int,
        recordings: Sequence[RecordingRoom] = (),
    ):
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(limits, self.pool, b"test", recordings)
        self.num_recordings = len(recordings)
        self.runner = FakeRunner(num_blocks, limits.block_size, next_token)
        self.depth = depth
        self.in_flight = deque()
        self.outputs: dict[int, list[TokenOutput]] = {}
        self.num_steps = 0

    def add(self, request: Request) -> None:
        self.outputs[request.request_id] = []
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        output = self.scheduler.abort(request)
        if output is not None:
            self.outputs[request.request_id].append(output)

    def step(self) -> bool:
        """One turn; False when there was nothing to do."""
        plan = self.scheduler.schedule() if len(self.in_flight) < self.depth else None
        if plan is not None:
            plan = decode_plan(encode_plan(plan))
            assert sum(plan.num_tokens) <= self.scheduler.limits.max_num_batched_tokens
            self.check_no_stage_waits(plan)
            result = decode_result(encode_result(self.runner.run(plan)))
            self.in_flight.append((plan, result))
            self.num_steps += 1
            self.last_plan = plan
        if self.in_flight and (plan is None or len(self.in_flight) == self.depth):
            for output in self.scheduler.commit(*self.in_flight.popleft()):
                self.outputs[output.request_id].append(output)
            return True
        return plan is not None

    def check_no_stage_waits(self, plan: StepPlan) -> None:
        """A token is drawn by the last stage: the first cannot read it before all have run."""
        recent = [done for done, _ in self.in_flight][::-1][: self.scheduler.limits.num_stages - 1]
        since_freed = set(plan.freed)  # by then another request's slot
        for before in recent:
            drawn = {before.slots[row] for row in before.sampling.rows}
            assert not (drawn - since_freed) & set(plan.slots)
            since_freed |= set(before.freed)

    def finish(self, limit: int) -> None:
        while self.step():
            assert self.num_steps < limit, "a request does not end"

    def answer(self, request_id: int) -> tuple[list[int], str | None]:
        outputs = self.outputs[request_id]
        assert all(o.finish_reason is None for o in outputs[:-1]), "an ended request goes on"
        tokens = [token for output in outputs for token in output.token_ids]
        return tokens, outputs[-1].finish_reason

    def check_at_rest(self) -> None:
        assert not self.scheduler.has_requests
        assert sorted(self.runner.recorded) == list(range(self.num_recordings))
        assert self.pool.num_free == self.pool.num_blocks
        assert len(self.scheduler._free_slots) == self.scheduler.limits.max_num_seqs


@dataclass
class Case:
    seed: int
    depth: int
    limits: Limits
    num_blocks: int
    num_requests: int
    recordings: list[RecordingRoom]


@st.composite
def cases(draw) -> Case:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    chunked = draw(st.booleans())
    max_len = 40
    limits = Limits(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 60)) if chunked else 60,
        block_size=block_size,
        enable_prefix_caching=draw(st.booleans()),
        enable_chunked_prefill=chunked,
        num_stages=draw(st.integers(1, 3)),
    )
    fewest = -(-max_len // block_size)
    num_blocks = fewest + draw(st.integers(0, fewest))
    slots = st.integers(1, limits.max_num_seqs)
    rooms = st.builds(
        lambda a, b, blocks: RecordingRoom(max(a, b), min(a, b), blocks),
        *(slots, slots, st.integers(1, fewest)),
    )
    recordings = draw(st.lists(rooms, max_size=12))
    seed, depth = draw(st.integers(0, 2**32)), draw(st.integers(1, 4))
    return Case(seed, depth, limits, num_blocks, 30, recordings)


def random_request(rng: random.Random, request_id: int) -> Request:
    shared = [7] * rng.choice([0, 8, 17])  # many prompts begin alike
    prompt = shared + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 12))]
    total = min(40, len(prompt) + rng.randint(1, 25))
    eos = frozenset([EOS]) if rng.random() < 0.7 else frozenset()
    spec = SamplingSpec(num_prompt_logprobs=rng.choice([-1, -1, 0]))
    return Request(request_id, list(prompt), spec, total, eos)


@settings(deadline=None)
@given(cases())
def test_every_request_ends_with_its_own_answer_and_nothing_leaks(case: Case):
    rng = random.Random(case.seed)
    sim = Simulation(case.limits, case.num_blocks, case.depth, case.recordings)
    requests, aborted = [], set()
    while len(requests) < case.num_requests:
        if rng.random() < 0.4:
            requests.append(random_request(rng, len(requests)))
            sim.add(requests[-1])
        if requests and rng.random() < 0.08:
            victim = rng.choice(requests)
            aborted.add(victim.request_id)
            sim.abort(victim)
        sim.step()
    sim.finish(limit=20_000)
    sim.check_at_rest()
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens].tolist()
        tokens, reason = sim.answer(request.request_id)
        expected, expected_reason = expected_answer(request, prompt)
        if reason == "abort":
            assert request.request_id in aborted and tokens == expected[: len(tokens)]
            continue
        assert (tokens, reason) == (expected, expected_reason)
        scores = [s.rank for o in sim.outputs[request.request_id] for s in o.prompt_logprobs]
        assert scores == (prompt[1:] if request.spec.num_prompt_logprobs >= 0 else [])


LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=64, block_size=4)


def one(request_id: int, prompt: Sequence[int], num_tokens: int, **fields) -> Request:
    return Request(request_id, list(prompt), SamplingSpec(), len(prompt) + num_tokens, **fields)


def test_first_come_first_served_and_the_oldest_is_never_preempted():
    sim = Simulation(LIMITS, num_blocks=10, depth=2)
    requests = [one(i, range(1 + i, 13 + i), 20) for i in range(4)]
    for request in requests:
        sim.add(request)
    sim.finish(limit=500)
    ends = [sim.outputs[i][-1].finish_reason for i in range(4)]
    assert ends == ["length"] * 4
    assert requests[0].num_preemptions == 0
    assert sim.scheduler.counters.num_preemptions > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_step_in_flight_costs_no_extra_step_when_the_length_is_known(depth):
    sim = Simulation(LIMITS, num_blocks=64, depth=depth)
    sim.add(one(0, [1, 2, 3], 10))
    sim.finish(limit=100)
    assert sim.num_steps == 10


def slots_of_steps(sim: Simulation, num_steps: int) -> list[list[int]]:
    """The rows of the next steps, each launched as soon as the depth allows."""
    slots = []
    while len(slots) < num_steps:
        before = sim.num_steps
        sim.step()
        if sim.num_steps > before:
            slots.append(sorted(sim.last_plan.slots))
    return slots


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_all_have_work_and_requests_are_dealt_evenly(stages, extra):
    limits = replace(LIMITS, max_num_seqs=7, num_stages=stages)
    sim = Simulation(limits, num_blocks=200, depth=stages + extra)
    for i in range(7):
        sim.add(one(i, [i + 1], 30))
    steps = slots_of_steps(sim, 8 * stages)
    for first in range(0, len(steps), stages):
        cycle = steps[first : first + stages]
        assert sorted(slot for step in cycle for slot in step) == list(range(7))  # each once
        assert all(step for step in cycle)
    sim.finish(limit=400)


def test_with_more_stages_than_requests_each_goes_on_as_soon_as_its_token_is_there():
    sim = Simulation(replace(LIMITS, num_stages=3), num_blocks=64, depth=4)
    sim.add(one(0, [1, 2], 10))
    sim.add(one(1, [3, 4], 10))
    sim.finish(limit=30)
    assert sim.num_steps == 20  # a step each: they never share one, none is wasted
    sim.check_at_rest()


def test_a_long_prompt_keeps_all_stages_busy_with_its_chunks():
    sim = Simulation(replace(LIMITS, max_num_batched_tokens=8, num_stages=3), 64, depth=3)
    sim.add(one(0, range(1, 41), 2))
    assert slots_of_steps(sim, 5) == [[0]] * 5 and sim.num_steps == 5
    assert len(sim.in_flight) == 2
    sim.finish(limit=10)


def test_no_request_starves_when_the_youngest_cannot_grow():
    """It is its turn, it needs a block that an older one holds, which could go on: so that does."""
    limits = replace(LIMITS, num_stages=2, enable_prefix_caching=False)
    for depth in (1, 2, 3):
        sim = Simulation(limits, num_blocks=6, depth=depth)
        for i in range(3):
            sim.add(one(i, [i + 1] * 5, 19))
        sim.finish(limit=500)
        sim.check_at_rest()
        assert [sim.answer(i)[1] for i in range(3)] == ["length"] * 3


@pytest.mark.parametrize("seed", [198, 532])
def test_blocks_are_never_taken_from_a_row_of_the_coming_step(seed):
    """With stages a younger request may stand before an older one in a step. Seeds that show it."""
    budget, depth, caching = {198: (8, 4, False), 532: (11, 3, True)}[seed]
    limits = Limits(5 if seed == 198 else 6, budget, 4, caching, num_stages=2)
    sim, rng, requests = Simulation(limits, num_blocks=17, depth=depth), random.Random(seed), []
    while len(requests) < 30:
        if rng.random() < 0.4:
            requests.append(random_request(rng, len(requests)))
            sim.add(requests[-1])
        sim.step()
    sim.finish(limit=20_000)
    sim.check_at_rest()
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens].tolist()
        assert sim.answer(request.request_id) == expected_answer(request, prompt)


def test_equal_prompts_share_blocks_even_within_one_step():
    sim = Simulation(LIMITS, num_blocks=64, depth=1)
    prompt = list(range(1, 18))
    for i in range(3):
        sim.add(one(i, prompt, 1))
    sim.finish(limit=10)
    assert sim.runner.num_prefilled == 17 + 1 + 1  # 4 blocks of 4 shared, one token left each
    assert sim.outputs[2][0].num_cached_tokens == 16


def test_prefix_caching_can_be_turned_off():
    limits = replace(LIMITS, enable_prefix_caching=False)
    sim = Simulation(limits, num_blocks=64, depth=1)
    for i in range(2):
        sim.add(one(i, range(1, 18), 1))
    sim.finish(limit=10)
    assert sim.runner.num_prefilled == 2 * 17


def test_a_long_prompt_is_read_in_chunks_beside_running_requests():
    limits = replace(LIMITS, max_num_batched_tokens=8)
    sim = Simulation(limits, num_blocks=64, depth=1)
    sim.add(one(0, [1, 2], 12))
    sim.step()
    sim.add(one(1, range(1, 33), 2))
    while not sim.outputs[1]:
        before = len(sim.outputs[0])
        sim.step()
        assert len(sim.outputs[0]) == before + 1  # the running request never waits
    assert sim.runner.num_prefilled >= 34


def test_stop_ids_end_an_answer_and_are_named():
    tokens, _ = expected_answer(one(0, [5, 6], 20), [5, 6])
    sim = Simulation(LIMITS, num_blocks=64, depth=3)
    sim.add(one(0, [5, 6], 20, stop_ids=frozenset([tokens[3]])))
    sim.finish(limit=100)
    ended = tokens.index(tokens[3]) + 1
    assert sim.answer(0) == (tokens[:ended], "stop")
    assert sim.outputs[0][-1].stop_token_id == tokens[3]


def test_results_out_of_order_are_refused():
    sim = Simulation(LIMITS, num_blocks=64, depth=1)
    sim.add(one(0, [1], 3))
    plan = sim.scheduler.schedule()
    assert plan is not None
    result = replace(sim.runner.run(plan), step_id=7)
    with pytest.raises(RuntimeError, match="out of order"):
        sim.scheduler.commit(plan, result)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_preempted_request_is_the_next_to_be_admitted(depth):
    """Then running and waiting requests together always stand in the order they came in."""
    sim = Simulation(LIMITS, num_blocks=8, depth=depth)
    for i in range(8):
        sim.add(one(i, range(1 + i, 7 + i), 14))
    scheduler, num_checked = sim.scheduler, 0
    while sim.step():
        order = [request.request_id for request in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        resumed = [r for r in scheduler.waiting if r.num_preemptions]
        num_checked += 0 < len(resumed) < len(scheduler.waiting)
    assert num_checked > 0  # some stood before requests that had never run


def test_a_preempted_request_with_its_last_token_promised_computes_no_more():
    limits = replace(LIMITS, enable_prefix_caching=False)
    sim = Simulation(limits, num_blocks=6, depth=3)
    oldest, middle, last = one(0, [1] * 7, 9), one(1, [2] * 6, 9), one(2, [3] * 7, 2)
    for request in (oldest, middle, last):
        sim.add(request)
    sim.step()
    sim.step()
    assert last.num_promised == 2 and last.num_pending == 0
    sim.in_flight.append(step := run_one(sim))  # the oldest takes a block from the youngest
    assert last in sim.scheduler.waiting and step[0].preempted == [last.slot]
    sim.abort(middle)
    assert sim.pool.num_free >= 3  # there is room for it again, but nothing to compute
    sim.in_flight.append(step := run_one(sim))
    assert step[0].slots == [oldest.slot] and not step[0].starts
    sim.finish(limit=50)
    assert sim.answer(2) == (expected_answer(last, [3] * 7)[0], "length")
    sim.check_at_rest()


def run_one(sim: Simulation):
    plan = sim.scheduler.schedule()
    assert plan is not None
    return plan, sim.runner.run(plan)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_prompt_is_split_over_steps_only_if_chunks_are_allowed(chunked):
    limits = replace(LIMITS, max_num_batched_tokens=20, enable_chunked_prefill=chunked)
    sim = Simulation(limits, num_blocks=64, depth=1)
    lengths = [12, 9, 15, 7, 11]
    for i, length in enumerate(lengths):
        sim.add(one(i, range(20 * i, 20 * i + length), 3))
    firsts = {}  # first row of each request: how much of the prompt it reads
    while sim.scheduler.has_requests:
        plan, result = run_one(sim)
        rows = dict(zip(plan.slots, plan.num_tokens, strict=True))
        firsts |= {new.token_ids[0] // 20: rows[new.slot] for new in plan.new}
        sim.scheduler.commit(plan, result)
    whole = list(firsts.values()) == lengths
    assert list(firsts) == [0, 1, 2, 3, 4] and whole != chunked


@pytest.mark.parametrize("field", ["eos_ids", "stop_ids"])
@pytest.mark.parametrize("min_tokens", range(14))
def test_min_tokens_holds_every_end_back_but_the_length(field, min_tokens):
    answer, _ = expected_answer(one(0, [5, 6], 12), [5, 6])
    ids = frozenset([answer[3], answer[7]])
    sim = Simulation(LIMITS, num_blocks=64, depth=2)
    sim.add(Request(0, [5, 6], SamplingSpec(min_tokens=min_tokens), 2 + 12, **{field: ids}))
    sim.finish(limit=100)
    ends = [i + 1 for i, token in enumerate(answer) if token in ids and i + 1 >= min_tokens]
    expected = (answer[: ends[0]], "stop") if ends else (answer, "length")
    assert sim.answer(0) == expected


def test_blocks_without_a_prefix_are_handed_out_before_those_with_one():
    pool = BlockPool(3)
    known, unknown = pool.take((), 2), pool.take((), 1)
    for block in known:
        pool.publish(block, bytes([block]))
    pool.release(known)
    pool.release(unknown)
    assert pool.take((), 1) == unknown
    assert pool.match([bytes([block]) for block in known]) == known


# --- recordings ---


def recording_of(plan: StepPlan | None) -> int | None:
    return None if plan is None or plan.recording is None else plan.recording.index


def test_graphs_are_recorded_while_there_is_nothing_else_to_do():
    rooms = [RecordingRoom(3, 1, 2), RecordingRoom(1, 1, 5), RecordingRoom(4, 4, 6)]
    sim = Simulation(LIMITS, num_blocks=6, depth=2, recordings=rooms)
    assert sim.scheduler.has_recordings and not sim.scheduler.has_requests
    found = []
    while sim.step():
        if sim.last_plan.recording is not None and sim.last_plan.recording not in found:
            found.append(sim.last_plan.recording)
    assert [(r.index, len(r.slots), len(r.block_ids)) for r in found] == [
        (0, 3, 2),
        (1, 1, 5),
        (2, 4, 6),
    ]
    assert not sim.scheduler.has_recordings and sim.scheduler.schedule() is None
    sim.check_at_rest()


def test_requests_and_recordings_take_turns():
    rooms = [RecordingRoom(3, 1, 1)] * 3
    sim = Simulation(LIMITS, num_blocks=64, depth=1, recordings=rooms)
    sim.add(one(0, [5, 6], 6))
    turns = []
    while sim.step():
        turns.append(recording_of(sim.last_plan))
    assert turns == [0, None, 1, None, 2, None, None, None, None]
    assert sim.answer(0) == expected_answer(one(0, [5, 6], 6), [5, 6])
    sim.check_at_rest()


@pytest.mark.parametrize(
    "room", [RecordingRoom(4, 4, 1), RecordingRoom(1, 1, 61)], ids=["slots", "blocks"]
)
def test_a_recording_waits_until_requests_leave_room_and_others_go_first(room):
    rooms = [RecordingRoom(1, 1, 1), room, RecordingRoom(2, 1, 2)]
    sim = Simulation(LIMITS, num_blocks=64, depth=1, recordings=rooms)
    sim.add(one(0, range(16), 5))  # takes a slot and 4 or 5 blocks
    turns = []
    while sim.step():
        turns.append(recording_of(sim.last_plan))
    assert turns == [0, None, 2, None, None, None, None, 1]
    sim.check_at_rest()


def test_few_free_slots_are_enough_to_record_with():
    sim = Simulation(
        LIMITS, 64, depth=1, recordings=[RecordingRoom(1, 1, 1), RecordingRoom(4, 1, 1)]
    )
    for i in range(3):
        sim.add(one(i, [9, i], 5))
    plans = [run_one(sim)[0] for _ in range(3)]
    assert [recording_of(plan) for plan in plans] == [0, None, 1]
    assert len(plans[2].recording.slots) == 1 and not set(plans[2].recording.slots) & {0, 1, 2}


def test_what_a_recording_writes_over_is_no_cached_prefix_any_more():
    sim = Simulation(LIMITS, num_blocks=8, depth=1)
    prompt = list(range(1, 20))
    sim.add(one(0, prompt, 2))
    sim.finish(limit=50)
    assert sim.scheduler._cached_prefix(one(1, prompt, 2))
    sim.scheduler._recordings, sim.scheduler._to_record = [RecordingRoom(1, 1, 8)], [0]
    assert recording_of(run_one(sim)[0]) == 0
    assert not sim.scheduler._cached_prefix(one(1, prompt, 2))


def test_a_slot_is_told_to_be_free_before_it_is_recorded_with():
    sim = Simulation(LIMITS, num_blocks=8, depth=1, recordings=[RecordingRoom(4, 4, 1)])
    sim.scheduler._has_just_recorded = True
    sim.add(request := one(0, [5, 6], 6))
    sim.step()
    sim.abort(request)
    plan, _ = run_one(sim)
    assert recording_of(plan) == 0 and plan.freed == [0] and 0 in plan.recording.slots
