"""A server as small as can be: speaks HTTP/1.1 on 127.0.0.1 and answers as a test tells it to."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[dict[str, Any]], AsyncIterator[bytes]]  # a request's body -> bytes to send

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = {"data": [{"id": "m", "object": "model", "max_model_len": 64, "root": "/nowhere"}]}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload: Any) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {text}\n\n".encode()


def token(text: str = "a") -> bytes:
    return chunk(event({"choices": [{"index": 0, "text": text, "finish_reason": None}]}))


def usage(completion_tokens: int, cached_tokens: int = 0) -> bytes:
    counts = {
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return chunk(event({"choices": [], "usage": counts}))


DONE = chunk(event("[DONE]")) + b"0\r\n\r\n"


def plain(status: str, payload: Any) -> bytes:
    body = json.dumps(payload).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def well(request: dict[str, Any]) -> AsyncIterator[bytes]:
    """The tokens asked for, 5 ms apart."""
    yield STREAM
    for _ in range(request["max_tokens"]):
        await asyncio.sleep(0.005)
        yield token()
    yield usage(request["max_tokens"]) + DONE


@dataclass
class FakeServer:
    """Use it in a `with` block; it ends with it."""

    answer: Answer = well
    pages: dict[str, Any] = field(default_factory=lambda: {"/v1/models": MODELS})
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of POSTs
    headers: list[dict[str, str]] = field(default_factory=list)  # of all
    num_open: int = 0
    most_open: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> "FakeServer":
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _run(self, ready: threading.Event) -> None:
        self._loop.run_until_complete(self._serve(ready.set))
        self._loop.close()

    async def _serve(self, ready: Callable[[], None]) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        ready()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._respond(reader, writer.write, writer.drain)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client has gone
        finally:
            writer.close()

    async def _respond(
        self,
        reader: asyncio.StreamReader,
        write: Callable[[bytes], None],
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        self.headers.append(headers)
        method, path, _ = head[0].split(" ")
        if method == "GET":
            found = path in self.pages
            write(plain("200 OK" if found else "404 Not Found", self.pages.get(path)))
            return await drain()
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        assert path == "/v1/completions"
        self.requests.append(body)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            async for data in self.answer(body):
                write(data)
                await drain()
        finally:
            self.num_open -= 1
