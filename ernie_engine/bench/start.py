"""Seconds from a server's command to its first answer, whatever the command is.

The answer is one token at /v1/completions: what the server says of itself does not count. Owns the
server's process, which leads a group of its own so that none of its children stays.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ernie_engine.bench.connection import Address, connect

POLL_SECONDS = 0.05
NOT_YET = 503  # while the engine loads
END_SECONDS = 30.0
TAIL_BYTES = 2000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def seconds_to_first_answer(
    command: Sequence[str],
    environment: Mapping[str, str],
    address: Address,
    log: Path,
    timeout_s: float,
) -> float:
    """Starts `command`, which is to serve at `address`, and ends it again. ValueError if it ends
    by itself, refuses the request or takes too long, with what it wrote to `log` last."""
    began = time.perf_counter()
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return asyncio.run(_until_answered(server, address, timeout_s)) - began
    except ValueError as error:
        tail = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        raise ValueError(f"{error}; it wrote last:\n{tail}") from error
    finally:
        _end(server)


async def _until_answered(
    server: subprocess.Popen[bytes], address: Address, timeout_s: float
) -> float:
    """When the first answer was there."""
    deadline = time.perf_counter() + timeout_s
    while (left := deadline - time.perf_counter()) > 0:
        if server.poll() is not None:
            raise ValueError(f"the server ended with status {server.returncode}")
        with suppress(OSError, EOFError):  # nobody listens yet, or no longer
            async with asyncio.timeout(left):
                status, body = await _ask(address)
            if status == 200:
                return time.perf_counter()
            if status != NOT_YET:
                raise ValueError(f"the server refused the request with {status}: {body}")
        await asyncio.sleep(POLL_SECONDS)
    raise ValueError(f"timeout_s={timeout_s}: no answer came")


async def _ask(address: Address) -> tuple[int, str]:
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 1, "ignore_eos": True}).encode()
    async with connect(address, None) as connection:
        response = await connection.send("POST", f"{address.path}/completions", body)
        return response.status, (await response.body()).decode(errors="replace")


def _end(server: subprocess.Popen[bytes]) -> None:
    """By a signal to the server, which ends its children; what is left then is killed."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
