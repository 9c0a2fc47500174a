"""The answers of one call on their way to the client: a mailbox of pieces, and the times of each
choice for the metrics.

Filled by the engine client, read by one task. Never waits for a client's socket.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from ernie_engine.engine.assembler import ChoiceAssembler
from ernie_engine.engine.intake import Job
from ernie_engine.engine.request import Piece, TokenOutput
from ernie_engine.server.admission import Ticket
from ernie_engine.server.errors import ApiError
from ernie_engine.server.metrics import Metrics
from ernie_engine.server.wire import StepFrame

MAX_QUEUED_BYTES = 1 << 20  # of events that a slow reader has not taken; then it is let go
_BYTES_PER_PIECE = 256  # about what an event takes, without its text
MAX_QUEUED_PIECES = MAX_QUEUED_BYTES // _BYTES_PER_PIECE
_PIECES_PER_CHOICE = 16

Batch = Sequence[tuple[int, Piece]]  # (index of the prompt, piece)


class Session:
    """The requests of one call; `open` are those that have not ended. Read `batches()`."""

    def __init__(self, jobs: Sequence[Job], ticket: Ticket, metrics: Metrics):
        self.ticket, self.metrics = ticket, metrics
        self.open: dict[int, Choice] = {}
        for index, job in enumerate(jobs):
            prompt = _Prompt(len(job.requests))
            for request, assembler in zip(job.requests, job.assemblers, strict=True):
                prompt_len = len(request.token_ids)
                choice = Choice(self, index, assembler, prompt_len, prompt)
                self.open[request.request_id] = choice
        self.error: ApiError | None = None
        self._limit = MAX_QUEUED_PIECES + _PIECES_PER_CHOICE * len(self.open)
        self._queue: list[tuple[int, Piece]] = []
        self._wake = asyncio.Event()
        self._last_batch = time.monotonic()

    @property
    def overflows(self) -> bool:
        """Whether its reader is too slow."""
        return len(self._queue) > self._limit

    def put(self, prompt_index: int, piece: Piece) -> None:
        self._queue.append((prompt_index, piece))
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """End it; what is queued is still delivered."""
        self.error = self.error or error
        self._wake.set()

    def nudge(self, now: float, seconds: float) -> None:
        """Let the reader know that it is still open, if nothing came for so long."""
        if now - self._last_batch >= seconds:
            self._wake.set()

    async def batches(self) -> AsyncIterator[Batch]:
        """All that has come since the last one; empty after a long silence. ApiError at a fault."""
        while self.open or self._queue:
            await self._wake.wait()
            self._wake.clear()
            self._last_batch = time.monotonic()
            batch, self._queue = self._queue, []
            if batch or self.error is None:
                yield batch
        if self.error is not None:
            raise self.error


class _Prompt:
    """What the choices of a prompt have in common: how many are open, the longest answer."""

    def __init__(self, num_open: int):
        self.num_open, self.longest = num_open, 0


class Choice:
    """One engine request: its text, and when what happened to it."""

    def __init__(
        self,
        session: Session,
        prompt_index: int,
        assembler: ChoiceAssembler,
        prompt_len: int,
        prompt: _Prompt,
    ):
        self.session, self.prompt_index, self.prompt_len = session, prompt_index, prompt_len
        self._assembler, self._prompt, self._metrics = assembler, prompt, session.metrics
        self._arrived = time.monotonic()
        self._started = self._first = self._last = 0.0
        self._num_tokens = 0

    def take(self, output: TokenOutput, frame: StepFrame, now: float) -> bool:
        """Pass an output on. True if it was the last one: by itself or by a stop string."""
        for one in _one_by_one(output):
            piece = self._assembler.push(one)
            if piece.token_ids:
                self._count(output, frame, now)
            self.session.put(self.prompt_index, piece)
            if piece.finish_reason is not None:
                self._finish(piece.finish_reason, frame.preempted.get(output.request_id, 0))
                return True
        return False

    def _count(self, output: TokenOutput, frame: StepFrame, now: float) -> None:
        counters, observe = self._metrics.counters, self._metrics.observe
        if self._num_tokens == 0:
            self._first, self._started = now, frame.started_at.get(output.request_id, now)
            self.session.ticket.give_back(self.prompt_len)
            counters["prompt_tokens"] += self.prompt_len
            counters["prompt_tokens_cached"] += output.num_cached_tokens
            observe("time_to_first_token_seconds", now - self._arrived)
        else:
            observe("inter_token_latency_seconds", now - self._last)
        counters["generation_tokens"] += 1
        self._num_tokens += 1
        self._last = now

    def _finish(self, reason: str, num_preemptions: int) -> None:
        self._metrics.finished[reason] += 1
        observe, first, last = self._metrics.observe, self._first, self._last
        observe("e2e_request_latency_seconds", last - self._arrived)
        observe("request_queue_time_seconds", max(0.0, self._started - self._arrived))
        observe("request_prefill_time_seconds", first - self._started)
        observe("request_decode_time_seconds", last - first)
        observe("request_inference_time_seconds", last - self._started)
        observe("request_prompt_tokens", self.prompt_len)
        observe("request_generation_tokens", self._num_tokens)
        observe("request_num_preemptions", num_preemptions)
        if self._num_tokens > 1:
            per_token = (last - first) / (self._num_tokens - 1)
            observe("request_time_per_output_token_seconds", per_token)
        self._prompt.num_open -= 1
        self._prompt.longest = max(self._prompt.longest, self._num_tokens)
        if self._prompt.num_open == 0:
            observe("request_max_num_generation_tokens", self._prompt.longest)


def _one_by_one(output: TokenOutput) -> Iterable[TokenOutput]:
    """A step may bring several tokens; each is an event of its own."""
    if len(output.token_ids) <= 1:
        return (output,)
    last = len(output.token_ids) - 1
    return [
        output._replace(
            token_ids=output.token_ids[i : i + 1],
            logprobs=output.logprobs[i : i + 1],
            prompt_logprobs=() if i else output.prompt_logprobs,
            finish_reason=output.finish_reason if i == last else None,
            stop_token_id=output.stop_token_id if i == last else None,
        )
        for i in range(last + 1)
    ]
