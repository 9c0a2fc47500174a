"""The front end's process: HTTP on one side, the engine's socket on the other.

Started by the engine process with two descriptors that it inherits. Ends when the engine is gone
(status 1), or after draining when it is told to (status 0). Signals are for the engine process.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import uvicorn

from ernie_engine.framing import decode_json, kind_of, read_frame_async
from ernie_engine.server.app import make_app
from ernie_engine.server.banner import banner
from ernie_engine.server.client import EngineClient
from ernie_engine.server.errors import ApiError, unavailable
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.http_protocol import HttpProtocol
from ernie_engine.server.metrics import Metrics
from ernie_engine.server.served import read_served_model
from ernie_engine.server.settings import Settings
from ernie_engine.server.wire import (
    DRAIN,
    READY,
    STATE,
    STEP,
    decode_drain,
    decode_state,
    decode_step,
)

logger = logging.getLogger(__name__)
SOCKET_BUFFER = 4 << 20  # bytes read ahead from the engine
FLUSH_SECONDS = 3  # for the last events of connections that are being ended
KEEP_ALIVE_SECONDS = 75  # clients pool connections for up to 60
_POLL_SECONDS = 0.05


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Process:
    """Everything of one front end; run() until its end."""

    def __init__(self, reader: asyncio.StreamReader, front: FrontEnd):
        self._reader, self._front = reader, front
        loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = loop.create_future()
        self._ready: asyncio.Future[Mapping[str, Any]] = loop.create_future()
        self._deadline = float("inf")  # of draining
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket, model: Mapping[str, Any]) -> int:
        """Serve until the end; `model` is as read_served_model wants it."""
        config = uvicorn.Config(
            make_app(self._front),
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: self._end(1))
        self._start(self._read())
        self._start(self._load(model))
        status = await self._status
        if status != 0:
            self._front.client.fail_all(ApiError(500, "The engine has ended; so does the server."))
        server.should_exit = True
        await serving
        return status

    def _end(self, status: int) -> None:
        if not self._status.done():
            self._status.set_result(status)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """What runs beside the requests may not fail silently."""
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("the front end failed", exc_info=task.exception())
            self._end(1)

    async def _read(self) -> None:
        while (payload := await read_frame_async(self._reader)) is not None:
            self._take(payload)
            await asyncio.sleep(0)  # the answers' tasks take their turn between two steps
        self._end(1)

    def _take(self, payload: bytes) -> None:
        kind = kind_of(payload)
        if kind == STEP:
            self._front.client.take_step(decode_step(payload))
        elif kind == STATE:
            self._front.client.take_state(decode_state(payload))
        elif kind == READY:
            self._ready.set_result(decode_json(payload))
        elif kind == DRAIN:
            self._start(self._drain(decode_drain(payload)))
        else:
            raise ValueError(f"a frame of unknown kind {kind!r}")

    async def _load(self, model: Mapping[str, Any]) -> None:
        """While the engine process loads the weights."""
        front = self._front
        try:
            served = await front.in_thread(read_served_model, model)
        except ValueError as error:
            logger.error("%s", error)
            self._end(1)
            return
        front.serve(served, **await self._ready)
        print(banner(front.settings, served), flush=True)

    async def _drain(self, seconds: float) -> None:
        """Refuse new work at once; let running calls end in time, then end them. Told again, the
        nearer deadline counts."""
        self._front.is_draining = True
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        while self._front.num_active and time.monotonic() < self._deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self._front.client.fail_all(unavailable("The server is shutting down."))
        self._end(0)


async def _main(link: socket.socket, listener: socket.socket) -> int:
    reader, writer = await asyncio.open_connection(sock=link, limit=SOCKET_BUFFER)
    payload = await read_frame_async(reader)
    if payload is None:
        return 1
    told = decode_json(payload)
    settings = Settings.from_json(told["settings"])
    metrics = Metrics(settings.server.metrics_prefix, settings.model_names[0])
    client = EngineClient(writer, metrics, settings.server.sse_keep_alive)
    front = FrontEnd(settings, client, metrics)
    return await Process(reader, front).run(listener, told["model"])


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link, listener = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    link.setblocking(False)
    return asyncio.run(_main(link, listener))


if __name__ == "__main__":
    sys.exit(main())
