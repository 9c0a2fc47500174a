"""The loop's thread against a runner that answers a step only when the test lets it."""

import threading
import time
from contextlib import contextmanager
from functools import partial
from itertools import product
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from ernie_engine import EngineDeadError, SamplingParams
from ernie_engine.engine.block_pool import BlockPool
from ernie_engine.engine.loop import EngineLoop
from ernie_engine.engine.phases import PHASES, Phases
from ernie_engine.engine.plan import RecordingRoom, SamplingSpec
from ernie_engine.engine.ranks import Alone
from ernie_engine.engine.request import Request
from ernie_engine.engine.scheduler import Limits, Scheduler
from tests.engine.fake_runner import FakeRunner
from tests.tiny import open_engine

SOON = 10.0  # seconds after which a test is stuck


class Books:
    """FakeRunner as the loop wants it: launch() runs the whole step, sample() hands it over."""

    def __init__(self):
        self.fake, self.plans = FakeRunner(64, 4, next_token=len), []

    def launch(self, plan):
        self.plans.append(plan)
        self.result = self.fake.run(plan)

    def sample(self, part):
        return SimpleNamespace(wait=lambda result=self.result: result)


class Gate:
    """A runner around `inner` whose answers come one by one, as the test calls let()."""

    def __init__(self, inner):
        self.inner, self.error = inner, None
        self.launched, self.allowed = threading.Semaphore(0), threading.Semaphore(0)

    def launch(self, plan):
        self.inner.launch(plan)
        self.launched.release()

    def sample(self, part):
        return SimpleNamespace(wait=partial(self.answer, self.inner.sample(part)))

    def answer(self, pending):
        assert self.allowed.acquire(timeout=SOON), "the test forgot this step"
        if self.error is not None:
            raise self.error
        return pending.wait()

    def let(self, num_steps: int) -> None:
        self.allowed.release(num_steps)

    def wait_launched(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            assert self.launched.acquire(timeout=SOON), "no step was launched"


class Rig:
    """A loop over a gated fake runner."""

    def __init__(self, depth: int, replays: bool, num_recordings: int = 0):
        limits = Limits(max_num_seqs=4, max_num_batched_tokens=64, block_size=4)
        rooms = [RecordingRoom(2, 1, 3)] * num_recordings
        self.scheduler = Scheduler(limits, BlockPool(64), b"test", rooms)
        self.books, self.depth, self.replays = Books(), depth, replays
        self.gate = Gate(self.books)
        self.phases = Phases()
        ranks = Alone(self.gate, phases=self.phases)
        self.loop = EngineLoop(self.scheduler, ranks, depth, self.phases, replays)

    def submit(self, sink, *lengths: int, first_id: int = 0) -> list[Request]:
        requests = [
            Request(i, [50 + i], SamplingSpec(), 1 + length)
            for i, length in enumerate(lengths, first_id)
        ]
        self.loop.submit(requests, sink)
        return requests


@pytest.fixture(params=product([1, 2, 3], [False, True]), ids=str)
def rig(request):
    rig = Rig(*request.param)
    yield rig
    rig.gate.let(1000)
    rig.loop.close()
    assert not rig.loop._thread.is_alive()


def take(sink, count: int = 1) -> list:
    return [sink.get(timeout=SOON) for _ in range(count)]


def rest(sink) -> list:
    return [sink.get() for _ in range(sink.qsize())]


def ends(batch) -> list:
    return [(output.request_id, output.finish_reason) for output in batch]


def test_each_sink_gets_what_a_step_brought_it_at_once(rig):
    mine, yours = SimpleQueue(), SimpleQueue()
    rig.submit(mine, 3, 2)
    rig.submit(yours, 2, first_id=10)
    rig.gate.let(100)
    batches = take(mine, 3)
    assert {o.request_id for b in batches[:2] for o in b} == {0, 1}
    assert ends(batches[1])[1] == (1, "length") and ends(batches[2]) == [(0, "length")]
    assert [ends(batch) for batch in take(yours, 2)] == [[(10, None)], [(10, "length")]]
    rig.loop.close()
    assert rest(mine) == rest(yours) == []  # a sink whose requests have ended hears no death


def test_a_watcher_sees_every_phase_of_every_step_in_turn():
    rig, sink, seen = Rig(depth=1, replays=True), SimpleQueue(), []

    @contextmanager
    def watch(name, plan):
        seen.append((name, None if plan is None else plan.step_id))
        yield

    rig.phases.watcher = watch
    rig.submit(sink, 2)
    rig.gate.let(100)
    take(sink, 2)
    rig.loop.close()
    turns = [[(name, i if name == "launch" else None) for name in PHASES] for i in range(2)]
    turns[0].remove(("deliver", None))  # nothing had come
    assert seen == [*turns[0], *turns[1], ("deliver", None)]


def launches_when_told(rig, length: int, then_prompt: bool = False) -> list[int]:
    """How many steps were launched when each token of a request was told. `then_prompt`: a prompt
    of two tokens is there when the first step is taken in."""
    mine, launched = SimpleQueue(), []

    def put(batch):
        launched.append(len(rig.books.plans))
        mine.put(batch)

    rig.submit(SimpleNamespace(put=put), length)
    rig.gate.wait_launched(rig.depth)
    if then_prompt:
        rig.loop.submit([Request(9, [5, 6], SamplingSpec(), 3)], SimpleQueue())
    for _ in range(length):
        rig.gate.let(1)
        take(mine)
    return launched


def test_what_came_is_delivered_at_once_or_behind_a_replayed_step(rig):
    length = rig.depth + 3
    # When a step is taken in, `depth` were launched since; then perhaps one more, while there is.
    expected = [min(length, step + rig.depth + rig.replays) for step in range(length)]
    assert launches_when_told(rig, length) == expected


def test_what_came_is_delivered_before_a_prompt_is_launched(rig):
    assert launches_when_told(rig, 1 + rig.depth, then_prompt=True)[0] == rig.depth
    assert any(max(plan.num_tokens) == 2 for plan in rig.books.plans)


def test_what_came_is_told_before_the_death_by_a_launch(rig):
    mine, launch = SimpleQueue(), rig.books.launch

    def fail(plan):
        if plan.step_id == rig.depth:
            raise RuntimeError("the card is on fire")
        launch(plan)

    rig.books.launch = fail
    rig.submit(mine, 1, 9)
    rig.gate.let(1)
    batch, death = take(mine, 2)
    assert ends(batch) == [(0, "length"), (1, None)]
    assert isinstance(death, EngineDeadError)


def test_arrivals_that_nobody_read_get_the_death(rig):
    running, unread = SimpleQueue(), SimpleQueue()
    rig.submit(running, 9, 9)
    rig.gate.wait_launched()
    rig.submit(unread, 5, 5, first_id=10)
    rig.submit(unread, 5, first_id=20)
    error = rig.gate.error = RuntimeError("the card is on fire")
    rig.gate.let(1)
    for gone in (running, unread):
        (death,) = take(gone)
        assert isinstance(death, EngineDeadError) and death.__cause__ is error
        assert "on fire" in str(death)
    rig.loop._thread.join(SOON)
    assert rest(running) == rest(unread) == []  # once, however many requests it had
    with pytest.raises(EngineDeadError, match="on fire") as caught:
        rig.submit(unread, 1, first_id=30)
    assert caught.value.__cause__ is error and rig.loop.is_dead
    rig.loop.abort([0])
    rig.loop.close()


def test_aborting_what_has_ended_does_no_harm(rig):
    mine = SimpleQueue()
    rig.submit(mine, 1)
    rig.gate.wait_launched()
    rig.loop.abort([0])  # arrives behind the step that ends it, or with depth in time
    rig.loop.abort([0, 99])
    rig.gate.let(100)
    assert len(take(mine)[0]) == 1
    rig.loop.abort([0])
    rig.submit(mine, 2, first_id=1)
    assert [ends(batch) for batch in take(mine, 2)] == [[(1, None)], [(1, "length")]]
    assert not rig.loop.is_dead and rest(mine) == []


def test_an_abort_is_told_once_and_the_others_go_on(rig):
    mine = SimpleQueue()
    rig.submit(mine, 30, 4)
    rig.gate.wait_launched()
    rig.loop.abort([0, 0])
    rig.loop.abort([0])
    rig.gate.let(100)
    told, batch = [], []
    while (1, "length") not in ends(batch):
        (batch,) = take(mine)
        told += ends(batch)
    assert told.count((0, "abort")) == 1 and told.count((1, None)) == 3
    assert told.count((0, None)) <= 1 and told.index((0, "abort")) <= 2
    assert rig.scheduler.pool.num_free == 64


def test_a_request_aborted_before_the_loop_read_it_is_never_computed(rig):
    mine, other = SimpleQueue(), SimpleQueue()
    rig.submit(mine, 40)
    rig.gate.wait_launched(rig.depth)
    rig.loop.abort([10])  # nobody has heard of it: left alone
    rig.submit(other, 5, first_id=10)
    rig.loop.abort([10])
    rig.gate.let(3)
    (batch,) = take(other)
    assert ends(batch) == [(10, "abort")] and batch[0].token_ids == ()
    assert sum(len(plan.new) for plan in rig.books.plans) == 1


def test_close_ends_what_is_in_flight_and_what_waits_behind_it(rig):
    running, late = SimpleQueue(), SimpleQueue()
    rig.submit(running, 40)
    rig.gate.wait_launched(rig.depth)
    closing = threading.Thread(target=rig.loop.close)
    closing.start()
    while rig.loop._inbox.empty():
        time.sleep(0.001)
    rig.submit(late, 5, first_id=10)
    rig.gate.let(rig.depth)  # those in flight are waited for, not told
    closing.join(SOON)
    assert not closing.is_alive() and rig.loop.is_dead
    assert [ends(b) for b in rest(running)] == [[(0, None)], [(0, "abort")]]
    (death,) = rest(late)
    assert isinstance(death, EngineDeadError) and death.__cause__ is None
    assert len(rig.books.plans) == rig.depth  # nothing more was launched


def test_a_stall_shows_only_while_there_is_something_to_do(rig):
    mine = SimpleQueue()
    assert rig.loop.seconds_stalled == 0.0 and not rig.loop.is_dead
    before = time.monotonic()
    (request,) = rig.submit(mine, 6)
    rig.gate.wait_launched(rig.depth)
    time.sleep(0.05)
    assert 0.05 <= rig.loop.seconds_stalled <= time.monotonic() - before
    assert before <= request.started_at <= time.monotonic() - 0.05
    started_at = request.started_at
    rig.gate.let(100)
    while ends(take(mine)[0]) != [(0, "length")]:
        pass
    assert rig.loop.seconds_stalled == 0.0 and request.started_at == started_at
    time.sleep(0.01)
    moved_at = rig.loop._moved_at
    time.sleep(0.05)
    assert rig.loop._moved_at == moved_at  # it sleeps when there is nothing to do


# --- Session: what the Python API asks of the loop ---


def test_after_a_failure_from_outside_nothing_more_is_told(rig):
    """A caller who heard an error must not hear of an answer that ends well after it."""
    sink = SimpleQueue()
    rig.submit(sink, 9)
    rig.gate.let(1)
    sink.get(timeout=SOON)  # it is in the midst of steps
    rig.loop.fail(RuntimeError("rank 1 is lost"))
    rig.gate.let(10)
    assert rig.loop.close(SOON)
    told = []
    while not sink.empty():
        told.append(sink.get())
    assert isinstance(told[-1], EngineDeadError)


GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(params=[1, 3])
def gated(tiny, request):
    """An engine whose steps wait for the gate, and the gate."""
    with open_engine(tiny, max_steps_in_flight=request.param) as engine:
        stage = engine._core.ranks.stage
        stage.runner = gate = Gate(stage.runner)
        yield engine, gate
        gate.let(1000)


def steps_until_idle(engine) -> int:
    """How many steps there were when nothing runs any more."""
    scheduler, deadline = engine._core.scheduler, time.monotonic() + SOON
    while scheduler.has_requests or engine._loop._in_flight:
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.002)
    return scheduler._next_step_id


def test_closing_a_session_spares_the_steps_that_nobody_reads(gated):
    engine, gate = gated
    params = SamplingParams(max_tokens=60, **GREEDY)
    with engine.session() as session:
        session.add(engine.jobs([[5, 6, 7], [8, 9]], params))
        gate.let(2)
        pieces = [next(session) for _ in range(4)]
        assert sorted(index for index, _ in pieces) == [0, 0, 1, 1]
    gate.let(1000)
    assert steps_until_idle(engine) <= 2 + engine.config.max_steps_in_flight
    assert session.poll(0.0) is None and list(session) == []


def test_a_stop_string_spares_the_rest_of_its_answer(gated):
    engine, gate = gated
    params = SamplingParams(max_tokens=60, stop="e", logit_bias={ord_e(engine): 100.0}, **GREEDY)
    with engine.session() as session:
        session.add(engine.jobs([5, 6, 7], params))
        gate.let(1)
        ((_, piece),) = session
        assert (piece.finish_reason, piece.stop_reason) == ("stop", "e")
        gate.let(1000)
        assert steps_until_idle(engine) <= 1 + engine.config.max_steps_in_flight


def test_what_was_drawn_after_a_stop_string_is_dropped(gated):
    engine, gate = gated
    always_e = {"logit_bias": {ord_e(engine): 100.0}, **GREEDY}
    first = SamplingParams(max_tokens=9, stop="eee", **always_e)
    session = engine.session()
    session.add(engine.jobs([5, 6, 7], first))
    assert session.poll(0.01) is None  # not ended, but nothing has come
    session.add(engine.jobs([8, 9], SamplingParams(max_tokens=12, **always_e)))
    gate.let(1000)
    steps_until_idle(engine)  # both were drawn to their ends before one piece was read
    pieces = list(session)
    counts = [sum(len(piece.token_ids) for i, piece in pieces if i == job) for job in (0, 1)]
    assert counts == [3, 12]
    assert [piece.finish_reason for i, piece in pieces if i == 0] == [None, None, "stop"]


def ord_e(engine) -> int:
    (token,) = engine.tokenizer.encode("e")
    return token


# --- recordings ---


@pytest.fixture(params=[1, 2, 3])
def recording_rig(request):
    rig = Rig(request.param, True, num_recordings=4)
    yield rig
    rig.gate.let(1000)
    rig.loop.close()
    assert not rig.loop._thread.is_alive()


def test_graphs_are_recorded_without_a_request_and_then_it_is_settled(recording_rig):
    rig, done = recording_rig, threading.Event()
    waiter = threading.Thread(target=lambda: (rig.loop.settle(), done.set()), daemon=True)
    waiter.start()
    rig.gate.let(3)
    rig.gate.wait_launched(4)
    assert not done.wait(0.05)
    rig.gate.let(1)
    assert done.wait(SOON)
    assert rig.books.fake.recorded == [0, 1, 2, 3] and rig.gate.inner.plans[-1].step_id == 3
    assert not rig.gate.launched.acquire(timeout=0.05), "there is nothing left to do"
    rig.loop.settle()  # at once


def test_a_recording_that_hangs_is_a_stall(recording_rig):
    rig = recording_rig
    rig.gate.wait_launched(1)
    time.sleep(0.05)
    assert rig.loop.seconds_stalled > 0.02
    rig.gate.let(1000)
    rig.loop.settle()
    assert rig.loop.seconds_stalled == 0


def test_who_comes_between_recordings_is_answered_between_them(recording_rig):
    rig, sink = recording_rig, SimpleQueue()
    rig.gate.wait_launched(rig.depth)  # of recordings, and none is done yet
    rig.submit(sink, 3)
    rig.gate.let(1000)
    batches = take(sink, 3)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    rig.loop.settle()
    kinds = [plan.recording is not None for plan in rig.books.plans]
    assert rig.books.fake.recorded == [0, 1, 2, 3] and kinds.index(False) == rig.depth


def test_a_failed_recording_ends_the_engine_and_the_wait(recording_rig):
    rig, sink = recording_rig, SimpleQueue()
    rig.gate.error = RuntimeError("the CUDA graph is wrong")
    rig.gate.let(1000)
    with pytest.raises(EngineDeadError, match="the CUDA graph is wrong"):
        rig.loop.settle()
    with pytest.raises(EngineDeadError, match="the CUDA graph is wrong"):
        rig.submit(sink, 3)


def test_the_wait_ends_when_the_engine_is_closed(recording_rig):
    rig, found = recording_rig, SimpleQueue()

    def wait():
        try:
            rig.loop.settle()
        except EngineDeadError as error:
            found.put(str(error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    rig.gate.wait_launched(1)
    closing = threading.Thread(target=rig.loop.close, daemon=True)
    closing.start()
    time.sleep(0.05)
    rig.gate.let(1000)
    assert found.get(timeout=SOON) == "the engine is closed"
