"""A workload against an engine in this process, through its public API.

One thread submits what is due and reads what comes, so the time of a token is when the caller has
it, text included.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ernie_engine.bench.metrics import OnDone, RequestLog, Run
from ernie_engine.bench.workload import PlannedRequest
from ernie_engine.engine.engine import Engine, Session
from ernie_engine.engine.request import Piece, SamplingParams


@dataclass
class _Answer:
    """A request that has been submitted, and what has come of it."""

    request: PlannedRequest
    sent: float
    times: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    def log(self, error: str | None) -> RequestLog:
        num_inputs, num_outputs = len(self.request.prompt), len(self.times)
        return RequestLog(
            self.sent, self.times, num_inputs, num_outputs, self.num_cached_tokens, error
        )


@dataclass(frozen=True)
class OfflineDriver:
    """Sends workloads to `engine`; `params` apply to all requests but for max_tokens."""

    engine: Engine
    params: SamplingParams

    def run(
        self, requests: Sequence[PlannedRequest], max_concurrency: int | None, on_done: OnDone
    ) -> Run:
        """All of `requests`, each at its arrival but never more than max_concurrency at once."""
        with self.engine.session() as session:
            return _Running(self, session, requests, max_concurrency, on_done).run()


class _Running:
    """One run: what waits, what is open, what has ended."""

    def __init__(
        self,
        driver: OfflineDriver,
        session: Session,
        requests: Sequence[PlannedRequest],
        max_concurrency: int | None,
        on_done: OnDone,
    ):
        self.driver, self.session, self.on_done = driver, session, on_done
        self.waiting, self.limit = deque(requests), max_concurrency or len(requests)
        self.answers: list[_Answer] = []  # by index in the session
        self.logs: list[RequestLog] = []
        self.start = time.perf_counter()

    def run(self) -> Run:
        while self.waiting or len(self.logs) < len(self.answers):
            self._submit_due()
            timeout = self._until_next()
            if len(self.logs) == len(self.answers):
                time.sleep(timeout or 0.0)  # nothing is open
            elif (item := self.session.poll(timeout)) is not None:
                self._take(*item)
        return Run(self.logs, time.perf_counter() - self.start)

    def _can_submit(self, count: int) -> bool:
        return bool(self.waiting) and len(self.answers) + count - len(self.logs) < self.limit

    def _submit_due(self) -> None:
        """At once what is due at once, as Engine.generate() does."""
        now, due = time.perf_counter(), []
        while self._can_submit(len(due)) and self.waiting[0].arrival <= now - self.start:
            due.append(self.waiting.popleft())
        if due:
            self.answers += [_Answer(request, now) for request in due]
            params = [replace(self.driver.params, max_tokens=r.output_len) for r in due]
            prompts = [request.prompt for request in due]
            self.session.add(self.driver.engine.jobs(prompts, params))

    def _until_next(self) -> float | None:
        """Seconds to the next arrival that there is room for; None if an answer must end first."""
        if not self._can_submit(0):
            return None
        return max(0.0, self.start + self.waiting[0].arrival - time.perf_counter())

    def _take(self, index: int, piece: Piece) -> None:
        answer = self.answers[index]
        answer.times += [time.perf_counter()] * len(piece.token_ids)
        answer.num_cached_tokens = max(answer.num_cached_tokens, piece.num_cached_tokens)
        if piece.finish_reason is not None:
            error = "the engine aborted it" if piece.finish_reason == "abort" else None
            self.logs.append(answer.log(error))
            self.on_done(self.logs[-1])
