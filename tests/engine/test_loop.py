"""The loop's thread against a runner that answers a step only when the test lets it."""

import queue
import threading
import time

import pytest

from ernie_engine import EngineDeadError, SamplingParams
from ernie_engine.engine.block_pool import BlockPool
from ernie_engine.engine.loop import EngineLoop
from ernie_engine.engine.plan import SamplingSpec
from ernie_engine.engine.request import Request
from ernie_engine.engine.scheduler import Limits, Scheduler
from tests.engine.fake_runner import FakeRunner
from tests.tiny import open_engine

SOON = 20.0  # seconds after which a test is stuck


class Gate:
    """A runner around `inner` whose answers come one by one, as the test calls let()."""

    def __init__(self, inner):
        self.inner, self.error = inner, None
        self.launched, self.allowed = threading.Semaphore(0), threading.Semaphore(0)

    def launch(self, plan):
        self.inner.launch(plan)
        self.launched.release()

    def sample(self, part):
        return Gated(self, self.inner.sample(part))

    def let(self, num_steps: int) -> None:
        self.allowed.release(num_steps)

    def wait_launched(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            assert self.launched.acquire(timeout=SOON), "no step was launched"


class Gated:
    def __init__(self, gate: Gate, pending):
        self.gate, self.pending = gate, pending

    def wait(self):
        assert self.gate.allowed.acquire(timeout=SOON), "the test forgot this step"
        if self.gate.error is not None:
            raise self.gate.error
        return self.pending.wait()


class Books:
    """FakeRunner as the loop wants it: launch() runs the whole step, sample() hands it over."""

    def __init__(self, num_blocks: int, block_size: int):
        self.fake = FakeRunner(num_blocks, block_size, next_token=len)
        self.plans = []

    def launch(self, plan):
        self.plans.append(plan)
        self.result = self.fake.run(plan)

    def sample(self, part):
        result = self.result
        return type("Done", (), {"wait": lambda self: result})()


class Rig:
    """A loop over a gated fake runner, with sinks to look into."""

    def __init__(self, depth: int):
        limits = Limits(max_num_seqs=4, max_num_batched_tokens=64, block_size=4)
        self.scheduler = Scheduler(limits, BlockPool(64), digest_key=b"test")
        self.books = Books(64, 4)
        self.gate = Gate(self.books)
        self.loop = EngineLoop(self.scheduler, self.gate, depth)

    def submit(self, sink, *lengths: int, first_id: int = 0) -> list[Request]:
        requests = [
            Request(first_id + i, [50 + first_id + i], SamplingSpec(), 1 + length)
            for i, length in enumerate(lengths)
        ]
        self.loop.submit(requests, sink)
        return requests

    def fail(self) -> Exception:
        """The step that is waited for raises."""
        self.gate.error = RuntimeError("the card is on fire")
        self.gate.let(1)
        return self.gate.error


@pytest.fixture(params=[1, 2, 3])
def rig(request):
    rig = Rig(depth=request.param)
    yield rig
    rig.gate.let(1000)
    rig.loop.close()
    assert not rig.loop._thread.is_alive()


def sink() -> queue.SimpleQueue:
    return queue.SimpleQueue()


def take(sink, count: int = 1) -> list:
    return [sink.get(timeout=SOON) for _ in range(count)]


def rest(sink) -> list:
    return [sink.get() for _ in range(sink.qsize())]


def ends(batch) -> list:
    return [(output.request_id, output.finish_reason) for output in batch]


def test_each_sink_gets_what_a_step_brought_it_at_once(rig):
    mine, yours = sink(), sink()
    rig.submit(mine, 3, 2)
    rig.submit(yours, 2, first_id=10)
    rig.gate.let(100)
    batches = take(mine, 3)
    assert {o.request_id for b in batches[:2] for o in b} == {0, 1}
    assert ends(batches[1])[1] == (1, "length") and ends(batches[2]) == [(0, "length")]
    assert [ends(batch) for batch in take(yours, 2)] == [[(10, None)], [(10, "length")]]
    rig.loop.close()
    assert rest(mine) == rest(yours) == []  # a sink whose requests have ended hears no death


def test_arrivals_that_nobody_read_get_the_death(rig):
    running, unread = sink(), sink()
    rig.submit(running, 9, 9)
    rig.gate.wait_launched()
    rig.submit(unread, 5, 5, first_id=10)
    rig.submit(unread, 5, first_id=20)
    error = rig.fail()
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
    mine = sink()
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
    mine = sink()
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
    mine, other = sink(), sink()
    rig.submit(mine, 40)
    rig.gate.wait_launched(rig.loop._depth)
    rig.loop.abort([10])  # nobody has heard of it: left alone
    rig.submit(other, 5, first_id=10)
    rig.loop.abort([10])
    rig.gate.let(3)
    (batch,) = take(other)
    assert ends(batch) == [(10, "abort")] and batch[0].token_ids == ()
    assert sum(len(plan.new) for plan in rig.books.plans) == 1


def test_close_ends_what_is_in_flight_and_what_waits_behind_it(rig):
    running, late = sink(), sink()
    rig.submit(running, 40)
    rig.gate.wait_launched(rig.loop._depth)
    closing = threading.Thread(target=rig.loop.close)
    closing.start()
    while rig.loop._inbox.empty():
        time.sleep(0.001)
    rig.submit(late, 5, first_id=10)
    rig.gate.let(1)
    closing.join(SOON)
    assert not closing.is_alive() and rig.loop.is_dead
    assert [ends(b) for b in rest(running)] == [[(0, None)], [(0, "abort")]]
    (death,) = rest(late)
    assert isinstance(death, EngineDeadError) and death.__cause__ is None
    assert len(rig.books.plans) == rig.loop._depth  # nothing more was launched


def test_a_stall_shows_only_while_there_is_something_to_do(rig):
    mine = sink()
    assert rig.loop.seconds_stalled == 0.0 and not rig.loop.is_dead
    before = time.monotonic()
    (request,) = rig.submit(mine, 6)
    rig.gate.wait_launched(rig.loop._depth)
    time.sleep(0.05)
    assert 0.05 <= rig.loop.seconds_stalled <= time.monotonic() - before
    assert before <= request.started_at <= time.monotonic() - 0.05
    started_at = request.started_at
    rig.gate.let(100)
    while ends(take(mine)[0]) != [(0, "length")]:
        pass
    assert rig.loop.seconds_stalled == 0.0 and request.started_at == started_at
