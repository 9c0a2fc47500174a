"""The engine as the front end knows it: requests go down, steps and its state come up.

Owns the asyncio side of the socket and which request belongs to which session. When the engine is
gone every session ends with an error; a fault in one request's text ends that request only.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from ernie_engine.engine.intake import Job
from ernie_engine.engine.request import TokenOutput
from ernie_engine.framing import framed
from ernie_engine.server.admission import Ticket
from ernie_engine.server.errors import ApiError, unavailable
from ernie_engine.server.metrics import Metrics
from ernie_engine.server.session import Choice, Session
from ernie_engine.server.wire import EngineState, StepFrame, encode_abort, encode_requests

logger = logging.getLogger(__name__)
MAX_SILENCE = 5.0  # seconds; the engine tells its state every quarter of one


class EngineClient:
    """Everything happens on the event loop, between two awaits."""

    def __init__(self, writer: asyncio.StreamWriter, metrics: Metrics, sse_keep_alive: float):
        self._writer, self._metrics, self._sse_keep_alive = writer, metrics, sse_keep_alive
        self._choices: dict[int, Choice] = {}
        self._sessions: set[Session] = set()
        self._refusal: ApiError | None = None
        self.heard_at = time.monotonic()

    @property
    def num_open(self) -> int:
        """Calls being answered."""
        return len(self._sessions)

    def submit(self, jobs: Sequence[Job], ticket: Ticket) -> Session:
        """Start the jobs of one call; ApiError if the engine takes no more."""
        if self._refusal is not None:
            raise self._refusal
        session = Session(jobs, ticket, self._metrics)
        self._sessions.add(session)
        self._choices.update(session.open)
        for job in jobs:
            self._writer.write(framed(encode_requests(job.requests)))
        return session

    def close(self, session: Session) -> None:
        """Abort what is still open of a session. Twice does no harm."""
        self._end(session, "abort")
        self._sessions.discard(session)

    def fail_all(self, error: ApiError) -> None:
        """End every session, and refuse new ones, with `error`."""
        self._refusal = error
        for session in self._sessions:
            self._end(session, "error", error)

    def problem(self, stall_timeout: float) -> str | None:
        """Why the engine cannot be called alive; None if it can."""
        if self._refusal is not None and self._refusal.status == 500:
            return self._refusal.message
        silence = time.monotonic() - self.heard_at
        if silence > MAX_SILENCE:
            return f"nothing was heard from the engine for {silence:.0f} s"
        stalled = self._metrics.state.seconds_stalled
        if stalled > stall_timeout:
            return f"work waits and no step has ended for {stalled:.0f} s"
        return None

    # --- what comes up ---

    def take_state(self, state: EngineState) -> None:
        self.heard_at = now = time.monotonic()
        self._metrics.state = state
        if self._sse_keep_alive:
            for session in self._sessions:
                session.nudge(now, self._sse_keep_alive)

    def take_step(self, frame: StepFrame) -> None:
        self.heard_at = now = time.monotonic()
        before, stopped = self._metrics.num_tokens, []
        for output in frame.outputs:
            choice = self._choices.get(output.request_id)
            if choice is None:
                continue  # aborted, or ended by a stop string, while this step ran
            if self._take(choice, output, frame, now) and output.finish_reason is None:
                stopped.append(output.request_id)
        if stopped:
            self._writer.write(framed(encode_abort(stopped)))
        if self._metrics.num_tokens > before:
            self._metrics.observe("iteration_tokens_total", self._metrics.num_tokens - before)

    def _take(self, choice: Choice, output: TokenOutput, frame: StepFrame, now: float) -> bool:
        """Whether the choice ended well with this output."""
        session = choice.session
        if output.finish_reason == "abort":
            self._end(session, "error", unavailable("The server ended the request. Try again."))
            return False
        if session.overflows:
            self._end(session, "abort", ApiError(408, "The answer was not read fast enough."))
            return False
        try:
            ended = choice.take(output, frame, now)
        except Exception:
            logger.exception("a request's output could not be turned into text")
            self._end(session, "error", ApiError(500, "The generation failed."))
            return False
        if ended:
            del self._choices[output.request_id], session.open[output.request_id]
        return ended

    def _end(self, session: Session, reason: str, error: ApiError | None = None) -> None:
        """Abort what is open of a session; with an error, tell its reader."""
        request_ids = list(session.open)
        self._metrics.finished[reason] += len(request_ids)
        for request_id in request_ids:
            del self._choices[request_id]
        session.open.clear()
        if error is not None:
            session.fail(error)
        if request_ids and not self._writer.is_closing():
            self._writer.write(framed(encode_abort(request_ids)))
