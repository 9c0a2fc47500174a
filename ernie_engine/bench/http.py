"""A workload against any OpenAI-compatible server: streamed /completions on token-id prompts.

One thread of asyncio. A token's time is when the bytes of its event were read. Never retries: what
fails is logged as failed.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ernie_engine.bench.connection import (
    MAX_ERROR_BYTES,
    Address,
    Connection,
    allow_many_connections,
    connect,
    get_json,
)
from ernie_engine.bench.metrics import OnDone, RequestLog, Run
from ernie_engine.bench.sse import EventStream
from ernie_engine.bench.workload import PlannedRequest
from ernie_engine.text.tokenizer import Tokenizer

FAILURES = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)  # a timeout is an OSError


@dataclass
class _Answer:
    """What has come of one request."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def take(self, event: bytes, now: float) -> None:
        """ValueError if the event is an error, or no JSON."""
        if event == b"[DONE]":
            self.done = True
            return
        chunk = json.loads(event)
        if not isinstance(chunk, dict):
            raise ValueError(f"in the stream: {event[:100]!r} is no JSON object")
        if chunk.get("error"):
            raise ValueError(f"in the stream: {chunk['error']}")
        if choices := chunk.get("choices"):
            self.times.append(now)
            self.texts.append(choices[0].get("text") or "")
        self.usage = chunk.get("usage") or self.usage

    def log(
        self, sent: float, request: PlannedRequest, tokenizer: Tokenizer | None, error: str | None
    ) -> RequestLog:
        num_outputs = self.usage.get("completion_tokens")
        if num_outputs is None and tokenizer is not None:
            num_outputs = len(tokenizer.encode("".join(self.texts), parse_special=False))
        if error is None and num_outputs is None:
            error = "the server sent no usage: give --tokenizer to count tokens by"
        if error is None and not (self.done and self.times):
            error = "the stream ended without [DONE] or without a token"
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return RequestLog(sent, self.times, len(request.prompt), num_outputs or 0, cached, error)


@dataclass(frozen=True)
class HttpDriver:
    """Sends workloads to a server. `fields` are added to each request's body.

    `tokenizer` counts output tokens where the server sends no usage.
    """

    address: Address
    model: str
    fields: dict[str, Any]
    api_key: str | None = None
    tokenizer: Tokenizer | None = None
    timeout_s: float | None = None  # of one request

    def run(
        self, requests: Sequence[PlannedRequest], max_concurrency: int | None, on_done: OnDone
    ) -> Run:
        """All of `requests`, each at its arrival but never more than max_concurrency at once."""
        allow_many_connections()
        bodies = [json.dumps(self._body(request)).encode() for request in requests]
        return asyncio.run(self._run(requests, bodies, max_concurrency, on_done))

    async def _run(
        self,
        requests: Sequence[PlannedRequest],
        bodies: Sequence[bytes],
        max_concurrency: int | None,
        on_done: OnDone,
    ) -> Run:
        gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
        start = time.perf_counter()

        async def one(request: PlannedRequest, body: bytes) -> RequestLog:
            await asyncio.sleep(max(0.0, start + request.arrival - time.perf_counter()))
            log = await self._ask(request, body, gate)
            on_done(log)
            return log

        logs = await asyncio.gather(*map(one, requests, bodies))
        return Run(logs, time.perf_counter() - start)

    async def _ask(
        self, request: PlannedRequest, body: bytes, gate: AbstractAsyncContextManager[Any]
    ) -> RequestLog:
        answer, error = _Answer(), None
        async with gate:
            sent = time.perf_counter()
            try:
                async with (
                    asyncio.timeout(self.timeout_s),
                    connect(self.address, self.api_key) as connection,
                ):
                    sent = time.perf_counter()
                    error = await self._stream(connection, body, answer)
            except FAILURES as failure:
                error = f"{type(failure).__name__}: {failure}"
        return answer.log(sent, request, self.tokenizer, error)

    async def _stream(self, connection: Connection, body: bytes, answer: _Answer) -> str | None:
        """Read a whole answer; what the server refused it with, if it did."""
        response = await connection.send("POST", f"{self.address.path}/completions", body)
        if response.status != 200:
            text = (await response.body())[:MAX_ERROR_BYTES].decode(errors="replace")
            return f"status {response.status}: {text}"
        events = EventStream()
        async for piece in response.pieces():
            now = time.perf_counter()
            for event in events.feed(piece):
                answer.take(event, now)
        return None

    def _body(self, request: PlannedRequest) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }


def served_models(address: Address, api_key: str | None) -> list[dict[str, Any]]:
    """The entries of /models. ValueError if the server cannot be reached or has none."""
    try:
        listed = asyncio.run(get_json(address, api_key, f"{address.path}/models"))
    except FAILURES as error:
        raise ValueError(
            f"base_url: no server answers at {address.host}:{address.port} ({error})"
        ) from error
    models = (listed or {}).get("data") or []
    if not models:
        raise ValueError(f"base_url: {address.path}/models names no model; give --model")
    return models


def server_facts(address: Address, api_key: str | None) -> dict[str, Any]:
    """What a server tells about itself at /version and /info, where it has them."""
    facts = {}
    for name in ("version", "info"):
        try:
            facts[name] = asyncio.run(get_json(address, api_key, f"/{name}"))
        except FAILURES:
            facts[name] = None
    return facts
