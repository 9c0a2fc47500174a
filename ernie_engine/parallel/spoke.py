"""The end of the control channel in a rank above 0.

Owns its connection to rank 0 and the end of this process: when rank 0 is lost, or says that it is
over by a failure, nothing is left to do.
"""

import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ernie_engine.framing import decode_json, encode_json, kind_of
from ernie_engine.parallel.control import (
    BLOCKS,
    BYE,
    FAIL,
    HELLO,
    PLAN,
    STOP,
    VERDICT_SECONDS,
    VITALS,
    WELCOME,
    Line,
    PeerLost,
    start_thread,
)
from ernie_engine.parallel.guard import Guard
from ernie_engine.parallel.health import INTERVAL_SECONDS, Vitals, Watch
from ernie_engine.parallel.world import World, host_name

logger = logging.getLogger(__name__)
WELCOME_SECONDS = 60.0  # rank 0 greets one after the other, strangers too


class Spoke:
    """The end of a rank above 0. When rank 0 is lost, or says that it is over by a failure, the
    process ends at once with status 1: there is nothing else for it to do."""

    def __init__(
        self,
        world: World,
        store: Store,
        timeout_seconds: float,
        facts: Mapping[str, Any],
        vitals: Callable[[], Vitals],
    ):
        self._rank, self._vitals = world.rank, vitals
        try:
            address = json.loads(store.get("control"))
        except RuntimeError as error:  # of the store: no such key in time, or nobody serves it
            raise PeerLost(f"rank 0 has not opened the control channel: {error}") from error
        self._line, host = _call(world, address, timeout_seconds, facts)
        self._plans: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._blocks: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._rank_0 = f"rank 0 ({host})"
        self._watch = Watch({0: self._rank_0}, timeout_seconds, time.monotonic())
        self._guard = Guard(timeout_seconds)
        self._reader = start_thread("spoke-reader", self._read)
        self._thread = start_thread("spoke-watch", self._look_after)

    def agree(self, num_blocks: int) -> int:
        """As Hub.agree."""
        self._line.send(encode_json(BLOCKS, {"num_blocks": num_blocks}))
        return self._blocks.get()

    def next_plan(self) -> bytes | None:
        """The next plan frame; None once rank 0 says that it is over."""
        return self._plans.get()

    def send_result(self, frame: bytes) -> None:
        self._line.send(frame)

    def fail(self, error: Exception) -> NoReturn:
        """Tell rank 0, and end with its verdict: it may know a cause."""
        told = {"reason": str(error), "is_user_error": isinstance(error, ValueError)}
        self._line.send(encode_json(FAIL, told))
        time.sleep(VERDICT_SECONDS)
        self._die(str(error))

    def leave(self) -> None:
        """After the last plan: say goodbye."""
        self._is_stopping.set()
        self._thread.join()
        self._line.send(encode_json(BYE, self._vitals().to_json()))
        self._reader.join(VERDICT_SECONDS)
        self._line.close()

    def close(self) -> None:
        """After all else: until here the guard ends a process that hangs in its last steps."""
        self._guard.close()

    def _read(self) -> None:
        while (payload := self._line.read()) is not None:
            kind = kind_of(payload)
            if kind == PLAN:
                self._plans.put(payload)
            elif kind == VITALS:
                self._watch.hear(0, Vitals.from_json(decode_json(payload)), time.monotonic())
            elif kind == BLOCKS:
                self._blocks.put(decode_json(payload)["num_blocks"])
            elif kind == FAIL:
                self._die(decode_json(payload)["reason"])
            elif kind == STOP:
                self._is_stopping.set()
                self._plans.put(None)
        if not self._is_stopping.is_set():
            self._die(f"{self._rank_0} has ended or cannot be reached")

    def _look_after(self) -> None:
        while not self._is_stopping.wait(INTERVAL_SECONDS):
            self._guard.beat()
            self._line.send(encode_json(VITALS, self._vitals().to_json()))
            if (verdict := self._watch.look(time.monotonic(), hangs=False)) is not None:
                self._die(verdict)

    def _die(self, reason: str) -> NoReturn:
        """From any thread; the main one may be held by a collective for ever."""
        logger.error("rank %d ends: %s", self._rank, reason)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def _call(
    world: World, address: Mapping[str, Any], timeout_seconds: float, facts: Mapping[str, Any]
) -> tuple[Line, str]:
    """The line to rank 0, and its host's name. PeerLost if it cannot be reached or refuses."""
    where = address["host"], address["port"]
    try:
        line = Line(socket.create_connection(where, timeout_seconds), timeout_seconds)
    except OSError as error:
        raise PeerLost(
            f"rank {world.rank} on {host_name()} cannot reach rank 0 at {where[0]}:{where[1]} "
            f"({error}): let that port through, control_port chooses it"
        ) from error
    me = {"rank": world.rank, "host": host_name(), "pid": os.getpid(), "facts": dict(facts)}
    line.send(encode_json(HELLO, {**me, "token": address["token"]}))
    overdue = threading.Timer(WELCOME_SECONDS, line.close)
    overdue.start()
    answer = line.read()
    overdue.cancel()
    if answer is None or kind_of(answer) != WELCOME:
        why = decode_json(answer)["reason"] if answer else "it closed the connection"
        raise PeerLost(f"rank 0 did not take rank {world.rank} in: {why}")
    return line, str(decode_json(answer)["host"])
