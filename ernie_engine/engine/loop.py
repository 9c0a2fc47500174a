"""The engine's heartbeat: arrivals -> schedule -> launch -> sample -> commit, in its own thread.

Owns the inbox and the deque of steps in flight. Everything that changes what the scheduler sees
(arrivals, aborts, the end) enters by the inbox, between two steps. Where decode steps are replayed,
what a step brought is delivered once the next one is launched: whom that wakes has Python's lock
while this thread waits for the GPU, and holds up no launch. Decides nothing itself.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ernie_engine.engine.phases import Phases
from ernie_engine.engine.plan import StepPlan, decode_result
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.engine.scheduler import Scheduler
from ernie_engine.engine.stage import plan_frame

logger = logging.getLogger(__name__)
_FAILED = "the engine failed"


class EngineDeadError(RuntimeError):
    """The engine's loop has ended, by an error (then its cause) or by close()."""


class ResultFrame(Protocol):
    def wait(self) -> bytes: ...


class Ranks(Protocol):
    """All ranks, as far as the loop knows them: engine/ranks.py."""

    debug: bool

    def run(self, frame: bytes) -> ResultFrame: ...

    def explain(self, error: Exception) -> Exception:
        """Why a step failed, if somebody knows better than the one who noticed."""
        ...


class Sink(Protocol):
    """Where outputs go: all that one step brought it, at once; EngineDeadError is the last."""

    def put(self, item: Sequence[TokenOutput] | EngineDeadError, /) -> None: ...


@dataclass(frozen=True)
class _Arrival:
    requests: Sequence[Request]
    sink: Sink


@dataclass(frozen=True)
class _Abort:
    request_ids: Iterable[int]


@dataclass(frozen=True)
class _Stop:
    pass


class EngineLoop:
    """Runs the scheduler and the ranks until close(); safe to call from any thread.

    `replays`: to launch a step of single tokens takes a millisecond at most, as with CUDA graphs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        ranks: Ranks,
        max_steps_in_flight: int,
        phases: Phases | None = None,
        replays: bool = False,
    ):
        self._replays = replays
        self._scheduler, self._ranks, self._depth = scheduler, ranks, max_steps_in_flight
        self._phase = phases or Phases()
        self._inbox: queue.SimpleQueue[_Arrival | _Abort | _Stop] = queue.SimpleQueue()
        self._in_flight: deque[tuple[StepPlan, ResultFrame]] = deque()
        self._undelivered: Sequence[TokenOutput] = ()
        self._open: dict[int, tuple[Request, Sink]] = {}
        self._lock = threading.Lock()  # between "is it dead?" and "then put it in the inbox"
        self._death: EngineDeadError | None = None
        self._moved_at = time.monotonic()
        self._settled = threading.Event()  # all graphs are recorded, or never will be
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Queue requests; their outputs arrive at `sink`. Raises EngineDeadError after the end."""
        with self._lock:
            if self._death is not None:
                raise EngineDeadError(str(self._death)) from self._death.__cause__
            self._inbox.put(_Arrival(requests, sink))

    def settle(self) -> None:
        """Wait until all graphs are recorded. Raises EngineDeadError if it ends before."""
        self._settled.wait()
        if self._death is not None:
            raise EngineDeadError(str(self._death)) from self._death.__cause__

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests wherever they are; those that have ended already are left alone."""
        self._inbox.put(_Abort(tuple(request_ids)))

    def close(self, timeout: float | None = None) -> bool:
        """End what is open as aborted, then the thread. Can be called twice. Whether it has
        ended: within `timeout` seconds it may hang in a step."""
        self._inbox.put(_Stop())
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def fail(self, error: Exception) -> None:
        """From outside: no step can be done any more, though one may never end. What is open
        hears of it at once."""
        self._die(error)
        self._inbox.put(_Stop())

    @property
    def is_dead(self) -> bool:
        return self._death is not None

    @property
    def seconds_stalled(self) -> float:
        """Since when it has not moved though there is something to do; 0 when there is not."""
        busy = self._in_flight or self._scheduler.has_requests or not self._settled.is_set()
        return time.monotonic() - self._moved_at if busy else 0.0

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._turn()
            self._abort(list(self._open))
            while self._in_flight:  # what others run with us, we leave together
                self._in_flight.popleft()[1].wait()
        except Exception as error:
            if self._death is None:
                logger.exception("the engine loop failed")
            try:
                self._deliver()
            finally:
                self._die(self._ranks.explain(error))
        self._die(None)

    def _die(self, error: Exception | None) -> None:
        """Once: nobody waits for an answer that cannot come, those running or in the inbox."""
        death = EngineDeadError("the engine is closed" if error is None else f"{_FAILED}: {error}")
        death.__cause__ = error
        with self._lock:
            if self._death is not None:
                return
            self._death = death
        sinks = [sink for _, sink in list(self._open.values())]
        sinks += [m.sink for m in self._unread() if isinstance(m, _Arrival)]
        for sink in {id(sink): sink for sink in sinks}.values():
            sink.put(death)
        self._settled.set()

    def _unread(self) -> Iterator[_Arrival | _Abort | _Stop]:
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    # --- one turn ---

    def _read_inbox(self) -> bool:
        """Take in all that has come; wait for something when there is nothing to do. False at
        the end."""
        scheduler = self._scheduler
        if not self._in_flight and not scheduler.has_recordings:
            self._settled.set()
        idle = not (self._in_flight or scheduler.has_requests or scheduler.has_recordings)
        if idle:
            self._deliver()
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            idle, self._moved_at = False, time.monotonic()
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                self._abort(message.request_ids)
                continue
            self._admit(message)
        return True

    def _admit(self, arrival: _Arrival) -> None:
        with self._lock:  # a death from outside tells those that are open by then
            if self._death is not None:
                arrival.sink.put(self._death)
                return
            for request in arrival.requests:
                self._open[request.request_id] = request, arrival.sink
        for request in arrival.requests:
            self._scheduler.add(request)

    def _abort(self, request_ids: Iterable[int]) -> None:
        self._deliver()  # who has ended by that is open no more
        for request_id in request_ids:
            if request_id in self._open:
                output = self._scheduler.abort(self._open[request_id][0])
                assert output is not None, "an ended request is not open"
                self._hand_out([output])

    def _turn(self) -> None:
        """Launch a step if one may still go out, take in the oldest if none did or enough have."""
        self._moved_at = time.monotonic()
        plan = None
        if len(self._in_flight) < self._depth:
            with self._phase("schedule"):
                plan = self._scheduler.schedule()
        if plan is not None:
            is_short = plan.recording is None and plan.num_tokens[-1] == 1  # longer rows come last
            if not is_short:  # perhaps it is launched for long
                self._deliver()
            self._launch(plan)
        self._deliver()
        if self._in_flight and (plan is None or len(self._in_flight) == self._depth):
            self._take_in(*self._in_flight.popleft())

    def _launch(self, plan: StepPlan) -> None:
        self._stamp_started({new.slot for new in plan.new})
        with self._phase("encode"):
            frame = plan_frame(plan, self._ranks.debug)
        self._in_flight.append((plan, self._ranks.run(frame)))

    def _take_in(self, plan: StepPlan, pending: ResultFrame) -> None:
        with self._phase("wait"):
            frame = pending.wait()
        with self._phase("commit"):
            self._undelivered = self._scheduler.commit(plan, decode_result(frame))
        if not self._replays:
            self._deliver()

    def _stamp_started(self, slots: Collection[int]) -> None:
        for request in self._scheduler.running if slots else ():
            if request.slot in slots:
                request.started_at = self._moved_at

    def _deliver(self) -> None:
        """What the steps taken in brought, if anything is left of it."""
        outputs, self._undelivered = self._undelivered, ()
        if outputs:
            with self._phase("deliver"):
                self._hand_out(outputs)

    def _hand_out(self, outputs: Iterable[TokenOutput]) -> None:
        """Each sink gets its outputs in one piece."""
        by_sink: dict[int, tuple[Sink, list[TokenOutput]]] = {}
        for output in outputs:
            _, sink = self._open[output.request_id]
            if output.finish_reason is not None:
                del self._open[output.request_id]
            by_sink.setdefault(id(sink), (sink, []))[1].append(output)
        for sink, batch in by_sink.values():
            if self._death is None:  # else its sink was told of that, and it was the last
                sink.put(batch)
