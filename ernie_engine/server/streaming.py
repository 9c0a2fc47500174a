"""An answer on its way out: one stream of events, as server-sent events or folded to one body.

Owns the framing of SSE, the usage counts and the end of a request whose client has gone. Knows
nothing of what an event holds.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ernie_engine.engine.request import Piece
from ernie_engine.server.calls import Call
from ernie_engine.server.errors import ApiError, generation_failed
from ernie_engine.server.rendering import Event, PromptAnswer, fold
from ernie_engine.server.session import Batch, Session

logger = logging.getLogger(__name__)

# ASCII only: readers that split lines at U+0085, U+2028 or U+2029 never see one.
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_DONE, _KEEP_ALIVE = b"data: [DONE]\n\n", b": keep-alive\n\n"
_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_FOLD_EVERY = 1024  # events of a choice that are kept before they are folded


@dataclass
class Usage:
    """Token counts of a call; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt

    def add(self, prompt_index: int, piece: Piece) -> None:
        self.completion_tokens += len(piece.token_ids)
        if piece.index == 0:
            self.cached_tokens[prompt_index] = piece.num_cached_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


@dataclass(frozen=True)
class Head:
    """What an answer and each of its chunks say of themselves."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Answer:
    """The answers of one call. Read frames() or whole(), once."""

    def __init__(
        self,
        call: Call,
        head: Head,
        prompts: Sequence[PromptAnswer],
        session: Session,
        usage: Usage,
        usage_on_finish: bool,
    ):
        self._call, self._head, self._prompts, self._session = call, head, prompts, session
        self._usage, self._usage_on_finish = usage, usage_on_finish and call.include_usage
        chunk = {**self._named("chat.completion.chunk", "text_completion"), "choices": []}
        self._start = f"data: {_dumps(chunk)[:-2]}".encode()  # up to the first choice

    def _named(self, chat: str, completion: str) -> dict[str, Any]:
        head = self._head
        return {
            "id": head.id,
            "object": chat if self._call.is_chat else completion,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events, all of a step's in one piece; the last is [DONE]. ApiError."""
        async for batch in self._session.batches():
            yield b"".join(map(self._frame, self._events(batch))) or _KEEP_ALIVE
        if self._call.include_usage:
            usage = _dumps(self._usage.to_json()).encode()
            yield self._start + b'],"usage":' + usage + b"}\n\n"
        yield _DONE

    def _frame(self, event: Event) -> bytes:
        choice, end = _dumps(event).encode(), b"]}\n\n"
        if self._call.continuous_usage or (self._usage_on_finish and event["finish_reason"]):
            end = b'],"usage":' + _dumps(self._usage.to_json()).encode() + b"}\n\n"
        return self._start + choice + end

    async def whole(self) -> dict[str, Any]:
        """The fold of the same events. ApiError."""
        events: dict[int, list[Event]] = {}
        async for batch in self._session.batches():
            for event in self._events(batch):
                of_choice = events.setdefault(event["index"], [])
                of_choice.append(event)
                if len(of_choice) > _FOLD_EVERY:
                    of_choice[:] = [fold(of_choice)]
        choices = [fold(events[index]) for index in sorted(events)]
        if self._call.is_chat:
            choices = [_with_message(choice) for choice in choices]
        named = self._named("chat.completion", "text_completion")
        return {**named, "choices": choices, "usage": self._usage.to_json()}

    def _events(self, batch: Batch) -> Iterator[Event]:
        for prompt_index, piece in batch:
            if not self._call.hides_answer:
                self._usage.add(prompt_index, piece)
            yield from self._prompts[prompt_index].events(piece)


class Reply(Response):
    """Sends an answer, and ends its requests when the client goes away at any moment."""

    def __init__(
        self,
        answer: Answer,
        stream: bool,
        request_id: str,
        headers: dict[str, str],
        close: Callable[[], None],
    ):
        super().__init__(headers=headers)
        self._answer, self._stream, self._request_id = answer, stream, request_id
        self._more_headers, self._close = headers, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = self._send_events(send) if self._stream else self._send_whole(scope, send)
        tasks = asyncio.ensure_future(sending), asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _send_events(self, send: Send) -> None:
        headers = {**_SSE_HEADERS, **self._more_headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for data in self._answer.frames():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            problem = self._as_api_error(error)
            frame = b"data: " + _dumps(problem.body()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": frame + _DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_whole(self, scope: Scope, send: Send) -> None:
        try:
            response = JSONResponse(await self._answer.whole(), headers=self._more_headers)
        except Exception as error:
            response = self._as_api_error(error).response()
        await response(scope, _nothing, send)

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        logger.error("request %s failed", self._request_id, exc_info=error)
        return generation_failed(self._request_id)


def _with_message(choice: Event) -> Event:
    return {"message" if key == "delta" else key: value for key, value in choice.items()}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    raise AssertionError("a JSON response reads nothing")
