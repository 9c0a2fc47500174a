"""HTTP/1.1 requests over asyncio streams, one connection each, opened before the request is sent.

Only what a benchmark client needs, so that little time is spent here. No redirects, no
compression, no proxies, no pool.
"""

import asyncio
import json
import resource
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ernie_engine.bench.sse import ChunkedBody

READ_BYTES = 1 << 16
MAX_ERROR_BYTES = 1 << 12


@dataclass(frozen=True)
class Address:
    """Where an OpenAI-compatible API is."""

    host: str
    port: int
    path: str  # of the API, without a slash at the end
    tls: ssl.SSLContext | None

    @classmethod
    def from_url(cls, base_url: str) -> "Address":
        """ "http://HOST:PORT" stands for "http://HOST:PORT/v1"; any other path is kept."""
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise ValueError(f"base_url={base_url!r}: give http://HOST:PORT/v1")
        tls = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if tls else 80)
        return cls(url.hostname, port, url.path.rstrip("/") or "/v1", tls)


@dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. ValueError or EOFError if it ends before its end."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            chunked = ChunkedBody()
            while not chunked.ended:
                yield chunked.feed(await self._read())
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left > 0:
                data = await self._read()
                left -= len(data)
                yield data
        else:
            while data := await self.reader.read(READ_BYTES):
                yield data

    async def _read(self) -> bytes:
        data = await self.reader.read(READ_BYTES)
        if not data:
            raise EOFError("the connection was closed in the midst of an answer")
        return data

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


@dataclass(frozen=True)
class Connection:
    """An open connection for one request."""

    address: Address
    api_key: str | None
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, method: str, path: str, body: bytes = b"") -> Response:
        """Send a request to `path`, which is absolute, and read the head of the answer."""
        self.writer.write(self._head(method, path, len(body)) + body)
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in head[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return Response(int(head[0].partition(" ")[2][:3]), headers, self.reader)

    def _head(self, method: str, path: str, length: int) -> bytes:
        address = self.address
        host = f"[{address.host}]" if ":" in address.host else address.host
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {host}:{address.port}",
            "Connection: close",
            "Accept-Encoding: identity",
        ]
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@asynccontextmanager
async def connect(address: Address, api_key: str | None) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
    try:
        yield Connection(address, api_key, reader, writer)
    finally:
        writer.close()


def allow_many_connections() -> None:
    """Raise this process's limit of open files to what the system lets it have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def get_json(address: Address, api_key: str | None, path: str) -> Any | None:
    """The JSON at an absolute path; None if the server answers with another status than 200."""
    async with connect(address, api_key) as connection:
        response = await connection.send("GET", path)
        body = await response.body()
    return json.loads(body) if response.status == 200 else None
