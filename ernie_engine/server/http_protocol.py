"""uvicorn's HTTP parser with limits for the head of a request: its size and how long it may take.

Owns what is answered to a client that does not speak HTTP. Sees no route and no body.
"""

import asyncio
import json
import uuid

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ernie_engine.server.errors import ApiError
from ernie_engine.server.gate import MAX_HEADER_BYTES

HEAD_SECONDS = 10.0


class HttpProtocol(HttpToolsProtocol):
    _head_bytes = 0  # of the head being read
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self._refuse(ApiError(431, f"The head is larger than {MAX_HEADER_BYTES} bytes."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._refuse(ApiError(408, f"The head did not arrive within {HEAD_SECONDS:.0f} s."))

    def _refuse(self, error: ApiError) -> None:
        """Without the application: there is no request yet that it could answer."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        head = (
            "content-type: application/json\r\n"
            f"x-request-id: {uuid.uuid4().hex}\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()
