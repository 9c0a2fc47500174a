"""The body of a streamed HTTP/1.1 answer, cut into events.

Bytes in, events out: no socket, no clock. Reads what API servers send; no general HTTP parser.
"""

MAX_SIZE_LINE = 1024


class ChunkedBody:
    """Takes the framing of "Transfer-Encoding: chunked" off (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self.ended = False
        self._pending = bytearray()
        self._left = 0  # bytes of the current chunk, with the line end after it

    def feed(self, data: bytes) -> bytes:
        """The body in `data`, which may be cut anywhere. ValueError if it is not so framed."""
        self._pending += data
        body = bytearray()
        while not self.ended and self._pending and (self._left or self._read_size()):
            body += self._pending[: max(0, self._left - 2)]
            taken = min(self._left, len(self._pending))
            del self._pending[:taken]
            self._left -= taken
        return bytes(body)

    def _read_size(self) -> bool:
        """Whether a chunk begins; False if its size line is not all there or is the last."""
        line, found, rest = self._pending.partition(b"\r\n")
        if not found:
            if len(line) > MAX_SIZE_LINE:
                raise ValueError("a chunk of the answer has no size")
            return False
        size = int(line.split(b";")[0], 16)
        self._pending, self._left, self.ended = rest, size + 2, size == 0
        return not self.ended


class EventStream:
    """The data of server-sent events. Other fields and comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The events that `body`, cut anywhere, completes."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
