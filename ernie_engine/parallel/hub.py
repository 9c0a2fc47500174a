"""Rank 0's end of the control channel.

Owns the connections to all other ranks, their threads, and the choice of who is to blame when
something breaks. Takes in no rank that does not know the token, nor one that was started otherwise.
"""

import hmac
import ipaddress
import json
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ernie_engine.framing import decode_json, encode_json, kind_of, read_frame
from ernie_engine.parallel.control import (
    BLOCKS,
    BYE,
    FAIL,
    RESULT,
    STOP,
    VERDICT_SECONDS,
    VITALS,
    WELCOME,
    Line,
    PeerLost,
    cut,
    refusal_key,
    start_thread,
)
from ernie_engine.parallel.guard import Guard
from ernie_engine.parallel.health import INTERVAL_SECONDS, Vitals, Watch
from ernie_engine.parallel.world import World, host_name

logger = logging.getLogger(__name__)
MAX_HELLO_BYTES = 64 << 10
HELLO_SECONDS = 5.0
SETTLE_SECONDS = 0.5  # one death makes several ranks complain: who died first is to blame


@dataclass
class _Peer:
    name: str
    line: Line
    reader: threading.Thread | None = None


class Hub:
    """Rank 0's end. `vitals` tells how this rank is; `end_of` what is known of a rank's end.

    Wherever a method blocks on other ranks, PeerLost (or a ValueError, if a rank could not serve
    what it was asked to) ends the wait. `on_failure` is called once, from a thread of the hub.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        timeout_seconds: float,
        port: int | None,
        vitals: Callable[[], Vitals],
        end_of: Callable[[int], str | None] = lambda rank: None,
    ):
        self._world, self._store, self._timeout = world, store, timeout_seconds
        self._vitals, self._end_of = vitals, end_of
        self.on_failure: Callable[[Exception], None] = lambda failure: None
        self.failure: Exception | None = None
        self._failed = threading.Event()
        self._peers: dict[int, _Peer] = {}
        self._results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._blocks: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self._trouble = threading.Event()
        self._lost: list[int] = []  # ranks whose connection broke, as are:
        self._told: list[tuple[int, str, bool]] = []  # (rank, what it said, a user's mistake?)
        self._is_stopping = False
        self._thread: threading.Thread | None = None  # once ranks are waited for
        self._rank_0 = f"rank 0 ({host_name()}, this process)"
        self._watch = Watch({0: self._rank_0}, timeout_seconds, time.monotonic())
        self._token = secrets.token_hex(32)
        host = "127.0.0.1" if world.is_one_host else world.master_addr
        self._listener = _listen(host, port)
        address = {"host": host, "port": self._listener.getsockname()[1], "token": self._token}
        store.set("control", json.dumps(address))

    # --- start-up ---

    def wait_for_all(self, facts: Mapping[str, Any], seconds: float) -> None:
        """Until every rank has come with the same facts (name -> value). ValueError names the
        first that differs, PeerLost those that did not come."""
        deadline = time.monotonic() + seconds
        self._guard = Guard(self._timeout)
        self._thread = start_thread("hub-watch", self._look_after)  # it also tells who has come
        self._listener.settimeout(INTERVAL_SECONDS)
        missing = set(range(1, self._world.size))
        while missing:
            self.check()
            for rank in sorted(missing):
                if self._store.check([refusal_key(rank)]):
                    raise ValueError(f"rank {rank}: {self._store.get(refusal_key(rank)).decode()}")
                if (end := self._end_of(rank)) is not None:
                    raise PeerLost(f"rank {rank} {end} before it joined")
            if time.monotonic() > deadline:
                raise PeerLost(f"ranks {sorted(missing)} did not join within {seconds:g} s")
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            missing.discard(self._greet(sock, missing, facts))
        self._listener.close()

    def _greet(self, sock: socket.socket, missing: set[int], facts: Mapping[str, Any]) -> int:
        """The rank that has come; -1 if it was a stranger. It is welcome if it has the token."""
        sock.settimeout(None)
        overdue = threading.Timer(HELLO_SECONDS, cut, [sock])  # for all of it, however it drips
        overdue.start()
        try:
            with sock.makefile("rb") as file:
                payload = read_frame(file, MAX_HELLO_BYTES)
            overdue.cancel()
            hello = decode_json(payload or b"")
            rank, token = hello["rank"], str(hello["token"])
            is_ours = hmac.compare_digest(token, self._token) and rank in missing
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("a stranger called at the control port: %s", error)
            is_ours, rank, hello = False, -1, {}
        if not is_ours:
            overdue.cancel()
            sock.close()
            return -1
        name = f"rank {rank} ({hello['host']}, pid {hello['pid']})"
        self._peers[rank] = peer = _Peer(name, Line(sock, self._timeout))
        if (difference := _difference(facts, hello["facts"])) is not None:
            raise ValueError(f"{name} was started with {difference}: use the same on all hosts")
        peer.line.send(encode_json(WELCOME, {"host": host_name()}))
        self._watch.meet(rank, name, time.monotonic())
        peer.reader = start_thread(f"hub-reader-{rank}", self._read, rank, peer)
        return rank

    def agree(self, num_blocks: int) -> int:
        """The fewest K/V blocks that any rank has room for; all are told."""
        fewest = num_blocks
        for _ in self._peers:
            item = self._blocks.get()
            if isinstance(item, Exception):
                raise item
            fewest = min(fewest, item)
        self._send_all(encode_json(BLOCKS, {"num_blocks": fewest}))
        return fewest

    def check(self) -> None:
        """Raises what has failed; for work that can stop between two of its parts."""
        if self.failure is not None:
            raise self.failure

    # --- steps ---

    def send_plan(self, frame: bytes) -> None:
        self._send_all(frame)

    def result(self) -> bytes:
        """The next result frame, of a rank that reports to this one."""
        item = self._results.get()
        if isinstance(item, Exception):
            self._results.put(item)  # for the next one who asks
            raise item
        return item

    def vitals(self) -> dict[int, Vitals]:
        return {rank: self._watch.vitals(rank) for rank in self._peers} | {0: self._vitals()}

    # --- the end ---

    def explain(self, error: Exception) -> Exception:
        """What this rank noticed, or the cause of it if the others know one. Ends all of them."""
        self._told.append((0, str(error), isinstance(error, ValueError)))
        self._trouble.set()
        self._failed.wait(VERDICT_SECONDS)
        return self.failure or error

    def stop(self) -> None:
        """Let the others end, after the plans they have; twice does no harm."""
        if not self._is_stopping and self._thread is not None:
            self._is_stopping = True
            self._send_all(encode_json(STOP, {}))
            for peer in self._peers.values():
                if peer.reader is not None:
                    peer.reader.join(self._timeout)
            self._trouble.set()
            self._thread.join()
            self._guard.close()
        for peer in self._peers.values():
            peer.line.close()
        self._listener.close()

    # --- its threads ---

    def _send_all(self, payload: bytes) -> None:
        for rank, peer in list(self._peers.items()):  # one may come meanwhile
            if not peer.line.send(payload):
                self._note_lost(rank)

    def _note_lost(self, rank: int) -> None:
        if not self._is_stopping:
            self._lost.append(rank)
            self._trouble.set()

    def _read(self, rank: int, peer: _Peer) -> None:
        while (payload := peer.line.read()) is not None:
            kind = kind_of(payload)
            if kind == RESULT:
                self._results.put(payload)
            elif kind == VITALS:
                self._watch.hear(rank, Vitals.from_json(decode_json(payload)), time.monotonic())
            elif kind == BLOCKS:
                self._blocks.put(decode_json(payload)["num_blocks"])
            elif kind == FAIL:
                data = decode_json(payload)
                self._told.append((rank, data["reason"], data["is_user_error"]))
                self._trouble.set()
            elif kind == BYE:
                self._watch.hear(rank, Vitals.from_json(decode_json(payload)), time.monotonic())
                return
        self._note_lost(rank)

    def _look_after(self) -> None:
        failure = None
        while failure is None:
            if self._trouble.wait(INTERVAL_SECONDS):
                if self._is_stopping:
                    return
                time.sleep(SETTLE_SECONDS)
                failure = self._blame()
                break
            self._guard.beat()
            now = time.monotonic()
            self._watch.hear(0, self._vitals(), now)
            verdict = self._watch.look(now)
            failure = None if verdict is None else PeerLost(verdict)
            if failure is None:
                self._send_all(encode_json(VITALS, self._vitals().to_json()))
        self._fail(failure)

    def _blame(self) -> Exception:
        """A rank that ended without a word, else the first that spoke."""
        said = {rank for rank, _, _ in self._told}
        for rank in self._lost:
            if rank not in said:
                end = self._end_of(rank) or "has ended or cannot be reached"
                state = self._watch.vitals(rank).state
                return PeerLost(f"{self._peers[rank].name} {end}; it was {state}")
        rank, reason, is_user_error = self._told[0]
        if is_user_error:
            return ValueError(reason if rank == 0 else f"{self._peers[rank].name}: {reason}")
        name = self._rank_0 if rank == 0 else self._peers[rank].name
        return PeerLost(f"{name} failed: {reason}")

    def _fail(self, failure: Exception) -> None:
        self.failure = failure
        self._is_stopping = True
        logger.error("%s", failure)
        word = encode_json(FAIL, {"reason": str(failure)})
        for peer in list(self._peers.values()):
            peer.line.send(word)
        for waiting in (self._results, self._blocks):
            waiting.put(failure)
        self._failed.set()
        self._guard.close()
        self.on_failure(failure)


def _listen(host: str, port: int | None) -> socket.socket:
    """At `host`. A name that is this host's own may stand for a loopback address here, which no
    other host could reach: then at all addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if _is_hidden(host):
            host = "0.0.0.0"
        return socket.create_server((host, port or 0), family=family, backlog=128)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen at {host}, control_port={port} ({error.strerror}): the first "
            "host's --master-addr must be an address of its own"
        ) from error


def _is_hidden(host: str) -> bool:
    """Whether a name, that is not an address, is one of loopback here (Debian's 127.0.1.1)."""
    if host == "localhost" or host.replace(".", "").isdecimal() or ":" in host:
        return False
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


def _difference(mine: Mapping[str, Any], theirs: Any) -> str | None:
    """What another rank has otherwise."""
    for name, value in mine.items():
        other = theirs.get(name) if isinstance(theirs, dict) else None
        if other != value:
            return f"{name}={other!r}, rank 0 with {value!r}"
    return None
