"""The process that the user starts: it holds the engine and looks after the front end.

Owns the order of starting and ending, signals and the exit status. Either process ends when the
other does; no request is left without an answer and no process behind.
"""

import errno
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from types import FrameType

from ernie_engine.engine.core import EngineCore, make_intake
from ernie_engine.engine.worker import describe_rank, serve_rank
from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.framing import MAX_FRAME_BYTES, encode_json
from ernie_engine.server.link import Link
from ernie_engine.server.served import describe_model
from ernie_engine.server.settings import ServerConfig, make_settings
from ernie_engine.server.wire import READY, SETTINGS, EngineState, encode_drain, encode_state

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 0.25
GRACE_SECONDS = 8.0  # beyond the time to drain, until a front end that hangs is killed
BACKLOG = 2048
_BYTES_PER_SCORE = 16  # a token id and a log-probability in a frame


class Event(Enum):
    SIGNAL = "a signal asks for the end"
    BROKEN = "the loop or the front end has ended"


Events = queue.SimpleQueue[Event]


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Serve until a signal or a failure; the exit status. ValueError for what cannot be served.
    Under torchrun rank 0 holds the front end, and the others work for it."""
    description = describe_rank(config)
    if description.world.rank > 0:
        serve_rank(description)
        return 0
    events: Events = queue.SimpleQueue()
    with listen(server, GRACE_SECONDS if description.world.is_launched else 0.0) as listener:
        settings = make_settings(server, config.model, listener.getsockname()[1], os.environ)
        warn_if_open(server, bool(settings.key_digests))
        check_frames(description.config)
        make_intake(description.config, description.model_config)  # is it sound? Before the weights
        front_end = FrontEndProcess(listener, events)
    try:
        on_signals(_exit)  # while loading there is nothing to drain
        model = describe_model(description.config, description.model_config)
        front_end.link.send(encode_json(SETTINGS, {"settings": settings.to_json(), "model": model}))
        core = EngineCore(description)
        on_signals(lambda number, frame: events.put(Event.SIGNAL))
        status = Supervisor(core, front_end, events, server.shutdown_timeout).run()
    finally:
        front_end.close()
    close_core(core)
    return status


def listen(server: ServerConfig, patience: float = 0.0) -> socket.socket:
    """Before anything is loaded: a port that is taken shows soon. When torchrun has restarted the
    ranks, the front end before this one may still be ending its answers."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_server((server.host, server.port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                where = f"host={server.host!r}, port={server.port}"
                raise ValueError(f"{where}: {error.strerror}") from error
        time.sleep(0.1)


def warn_if_open(server: ServerConfig, has_key: bool) -> None:
    if not server.is_loopback and not has_key:
        logger.warning(
            "LISTENING ON %s WITHOUT A KEY: everybody who can reach this machine can use the "
            "server. Set --api-key-file (or ERNIE_API_KEY), or leave --host out.",
            server.host,
        )


def check_frames(config: ResolvedConfig) -> None:
    """The log-probabilities of the largest step must fit a frame."""
    largest = config.max_num_batched_tokens * (config.max_logprobs + 2) * _BYTES_PER_SCORE
    if largest > MAX_FRAME_BYTES:
        raise ValueError(
            f"max_logprobs={config.max_logprobs} with max_num_batched_tokens="
            f"{config.max_num_batched_tokens}: a step's log-probabilities could take {largest} "
            f"bytes; at most {MAX_FRAME_BYTES} can be sent"
        )


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def close_core(core: EngineCore) -> None:
    """A loop that hangs in a kernel cannot be joined; the process ends all the same."""
    closing = threading.Thread(target=core.close, daemon=True)
    closing.start()
    closing.join(GRACE_SECONDS)
    if closing.is_alive() or core.is_held:
        logger.error("the engine's loop does not end: leaving without it")
        os._exit(1)


class FrontEndProcess:
    """The child, and the engine's end of the link to it."""

    def __init__(self, listener: socket.socket, events: Events):
        ours, theirs = socket.socketpair()
        with theirs:
            fds = theirs.fileno(), listener.fileno()
            command = [sys.executable, "-m", "ernie_engine.server.frontend", *map(str, fds)]
            self._child = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        self.pid = self._child.pid
        self.link = Link(ours, lambda: events.put(Event.BROKEN))

    def close(self) -> None:
        """End the link, and with it the front end, which first ends what is open."""
        self.link.close()
        self.wait()

    def wait(self) -> int:
        """Its exit status; it is killed if it takes too long."""
        try:
            return self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the front end does not end: killing it")
            self._child.kill()
            return self._child.wait()


class Supervisor:
    """From ready to the end: tells the front end how the engine is, and drains on a signal."""

    def __init__(
        self,
        core: EngineCore,
        front_end: FrontEndProcess,
        events: Events,
        shutdown_timeout: float,
    ):
        self._core, self._front_end, self._events = core, front_end, events
        self._shutdown_timeout = shutdown_timeout
        self._drains_until = math.inf
        self._is_draining = False

    def run(self) -> int:
        """The exit status: 0 only after a drain that the front end has finished."""
        link, loop = self._front_end.link, self._core.loop
        link.start_reading(loop)
        kernels = self._core.ops.implementations()
        ready = {"num_kv_blocks": self._core.num_kv_blocks, "kernels": kernels}
        link.send(encode_json(READY, ready))
        while not loop.is_dead and time.monotonic() < self._drains_until:
            event = self._next_event()
            if event is Event.SIGNAL:
                self._drain()
            elif event is Event.BROKEN:
                break
            else:
                link.try_send(encode_state(self._state()))
        drained = self._is_draining and not loop.is_dead and self._front_end.wait() == 0
        if not drained:
            logger.error("the %s has ended", "engine" if loop.is_dead else "front end")
        return 0 if drained else 1

    def _next_event(self) -> Event | None:
        try:
            return self._events.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            return None

    def _drain(self) -> None:
        """A second signal skips the wait."""
        seconds = 0.0 if self._is_draining else self._shutdown_timeout
        logger.info("shutting down; running requests get %g s", seconds)
        self._is_draining = True
        self._drains_until = time.monotonic() + seconds + GRACE_SECONDS
        self._front_end.link.try_send(encode_drain(seconds), GRACE_SECONDS)

    def _state(self) -> EngineState:
        """Read while the loop runs: each number is true, but not all of the same instant."""
        scheduler = self._core.scheduler
        pool, counters = scheduler.pool, scheduler.counters
        return EngineState(
            seconds_stalled=self._core.loop.seconds_stalled,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_used_blocks=pool.num_blocks - pool.num_free,
            num_blocks=pool.num_blocks,
            num_preemptions=counters.num_preemptions,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_compilations=self._core.num_compilations,
            num_graphs=self._core.num_graphs,
        )
