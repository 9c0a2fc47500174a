"""The control channel: rank 0 (hub.py) joined to every other rank (spoke.py) by a TCP connection
that carries plans, results, signs of life and the word that it is over.

Owns the kinds of frames and one connection. Bytes and JSON only, nothing is pickled; what a plan
means is not known here.
"""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ernie_engine.framing import framed, read_frame

PLAN, RESULT = b"plan", b"done"  # the kinds of engine/plan.py's frames
HELLO, WELCOME, BLOCKS, VITALS = b"helo", b"welc", b"bloc", b"vita"
FAIL, STOP, BYE = b"fail", b"stop", b"bye "

VERDICT_SECONDS = 3.0  # that a rank which noticed something waits to hear what it was


class PeerLost(RuntimeError):
    """A rank has ended, failed, hangs or cannot be reached; the message names it."""


class Line:
    """One connection; several threads may send, one reads."""

    def __init__(self, sock: socket.socket, timeout_seconds: float):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Who does not read holds us for a share of the time in which somebody must be named.
        patience = struct.pack("ll", *divmod(int(timeout_seconds * 1e6 / 4), 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket, self._file = sock, sock.makefile("rb")
        self._lock = threading.Lock()
        self._is_broken = False  # perhaps in the midst of a frame

    def send(self, payload: bytes) -> bool:
        """False if the other side is gone, or has not read for too long."""
        frame = framed(payload)
        try:
            with self._lock:
                if self._is_broken:
                    return False
                self._is_broken = True
                self._socket.sendall(frame)
                self._is_broken = False
        except OSError:
            return False
        return True

    def read(self, most: int | None = None) -> bytes | None:
        """The next payload; None at the end, however it came."""
        try:
            return read_frame(self._file) if most is None else read_frame(self._file, most)
        except OSError:
            return None

    def close(self) -> None:
        cut(self._socket)
        self._socket.close()


def refuse(store: Store, rank: int, reason: str) -> None:
    """Tell rank 0 that this rank will not come: it cannot serve what it was asked to."""
    store.set(refusal_key(rank), reason)


def refusal_key(rank: int) -> str:
    return f"refusal of rank {rank}"


def cut(sock: socket.socket) -> None:
    """End a connection; whoever reads from it sees that."""
    with suppress(OSError):  # the other side may have closed it
        sock.shutdown(socket.SHUT_RDWR)


def start_thread(name: str, function: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    thread.start()
    return thread
