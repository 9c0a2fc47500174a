"""The outermost layer of the application: what holds for every request, whatever its route.

Request ids, Host and key, closed CORS, in-flight counts, HTTP metrics. Reads no body.
"""

import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_engine.server.auth import check_host, check_key
from ernie_engine.server.errors import ApiError
from ernie_engine.server.metrics import OTHER, Metrics
from ernie_engine.server.settings import Settings

OPEN_PATHS = ("/health", "/ping", "/ready")
MAX_HEADERS, MAX_HEADER_BYTES = 128, 64 << 10
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    """ASGI middleware. Everything needs the key but OPEN_PATHS; compares the path that routes."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        server = settings.server
        self._open: Collection[str] = {*OPEN_PATHS, *(["/metrics"] * server.metrics_without_key)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to serve nothing else"
        started, status, headers = time.monotonic(), 500, Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ApiError as error:  # the routes' own errors are answered within
            await error.response()(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            handler = route.path if route is not None else OTHER
            took = time.monotonic() - started
            self._metrics.observe_http(handler, scope["method"], status, took)

    def _check(self, scope: Scope, headers: Headers) -> None:
        sizes = [len(name) + len(value) for name, value in headers.raw]
        if len(sizes) > MAX_HEADERS or sum(sizes) > MAX_HEADER_BYTES:
            raise ApiError(431, f"More than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes.")
        server = self._settings.server
        if server.is_loopback:
            check_host(headers.get("host", "localhost"), server.allowed_hosts)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            if not server.allowed_origins:
                raise ApiError(400, "This server may not be called by web pages (CORS).")
            return
        if scope["path"] not in self._open:
            check_key(headers.get("authorization", ""), self._settings.key_digests)
