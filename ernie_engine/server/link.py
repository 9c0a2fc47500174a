"""The engine's end of the socket: requests in, steps and states out, each in a thread of its own.

Owns the books on requests that the front end wants to hear about. A step never waits for a system
call; if the front end falls MAX_STEPS behind, the loop waits for it, which bounds the memory.
"""

import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ernie_engine.engine.loop import EngineDeadError, Sink
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.framing import framed, kind_of, read_frame
from ernie_engine.server.wire import (
    ABORT,
    REQUESTS,
    StepFrame,
    decode_abort,
    decode_requests,
    encode_step,
)

logger = logging.getLogger(__name__)
MAX_STEPS = 256
CLOSE_SECONDS = 2.0


class Loop(Protocol):
    """Of EngineLoop, what the link uses; tests and benchmarks bring their own."""

    def submit(self, requests: Sequence[Request], sink: Sink) -> None: ...

    def abort(self, request_ids: Iterable[int]) -> None: ...


class Link:
    """`on_end` is called, from any thread, when the front end or the loop has ended."""

    def __init__(self, sock: socket.socket, on_end: Callable[[], None]):
        self._socket, self._on_end = sock, on_end
        self._requests: dict[int, Request] = {}
        self._unstarted: set[int] = set()  # those that have no token yet
        self._outbox: queue.Queue[bytes | Sequence[TokenOutput] | None] = queue.Queue(MAX_STEPS)
        self._flushed = threading.Event()
        threading.Thread(target=self._write, name="link-writer", daemon=True).start()

    def start_reading(self, loop: Loop) -> None:
        threading.Thread(target=self._read, args=(loop,), name="link-reader", daemon=True).start()

    def send(self, payload: bytes) -> None:
        self._outbox.put(payload)

    def try_send(self, payload: bytes, seconds: float = 0.0) -> bool:
        """Whether there was room for it in time."""
        try:
            self._outbox.put(payload, block=seconds > 0, timeout=seconds or None)
        except queue.Full:
            return False
        return True

    def put(self, item: Sequence[TokenOutput] | EngineDeadError, /) -> None:
        """All requests' sink."""
        if isinstance(item, EngineDeadError):
            self._on_end()
        else:
            self._outbox.put(item)

    def close(self) -> None:
        """Send what is queued, if it is taken in time, and end the connection."""
        try:
            self._outbox.put(None, timeout=CLOSE_SECONDS)
            self._flushed.wait(CLOSE_SECONDS)
        except queue.Full:
            logger.warning("the front end does not read; what it was to be told is lost")
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("the front end has closed the connection already")
        self._socket.close()

    def _write(self) -> None:
        """To the end of the process: the loop must always find room for what it has."""
        is_open = True
        while True:
            item = self._outbox.get()
            if item is None:
                is_open = False
                self._flushed.set()
            elif is_open:
                payload = item if isinstance(item, bytes) else self._step(item)
                is_open = self._sent(framed(payload))  # the reader tells of the end

    def _sent(self, data: bytes) -> bool:
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def _step(self, outputs: Sequence[TokenOutput]) -> bytes:
        started_at, preempted = {}, {}
        for output in outputs:
            request_id = output.request_id
            if output.token_ids and request_id in self._unstarted:
                self._unstarted.discard(request_id)
                started_at[request_id] = self._requests[request_id].started_at
            if output.finish_reason is not None:
                self._unstarted.discard(request_id)
                num_preemptions = self._requests.pop(request_id).num_preemptions
                if num_preemptions:
                    preempted[request_id] = num_preemptions
        return encode_step(StepFrame(outputs, started_at, preempted))

    def _read(self, loop: Loop) -> None:
        try:
            with self._socket.makefile("rb") as file:
                while (payload := read_frame(file)) is not None:
                    self._take(payload, loop)
        except (OSError, EngineDeadError) as error:
            logger.debug("the link ends: %s", error)
        except Exception:
            logger.exception("the front end sent something unreadable")
        self._on_end()

    def _take(self, payload: bytes, loop: Loop) -> None:
        kind = kind_of(payload)
        if kind == REQUESTS:
            requests = decode_requests(payload)
            for request in requests:
                self._requests[request.request_id] = request
                self._unstarted.add(request.request_id)
            loop.submit(requests, self)
        elif kind == ABORT:
            loop.abort(decode_abort(payload))
        else:
            raise ValueError(f"a frame of unknown kind {kind!r}")
