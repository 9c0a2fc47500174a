"""How many tokens a second one front-end process can stream.

python scripts/bench_frontend.py            64 and 256 clients, 256 tokens each

A fake engine speaks the wire protocol and brings every open request a token per step, as fast as
the front end takes them; clients in a third process only count. Prints a line of JSON for each run.
When it is the front end that is slow, several tokens of a client go out in one write; to see what a
write each costs, give --steps-per-second.
"""

import argparse
import json
import platform
import queue
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ernie_engine.engine.core import describe
from ernie_engine.engine.loop import Sink
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.engine_config import EngineConfig
from ernie_engine.framing import encode_json
from ernie_engine.server.engine_process import FrontEndProcess, listen
from ernie_engine.server.served import describe_model
from ernie_engine.server.settings import ServerConfig, make_settings
from ernie_engine.server.wire import READY, SETTINGS, EngineState, encode_state
from ernie_engine.testing.checkpoints import write_checkpoint
from ernie_engine.testing.spec import CheckpointSpec

TOKEN_IDS = range(300, 1800)  # pieces of a few letters


class FakeLoop:
    """An engine loop without an engine: a step is a random token for each open request."""

    def __init__(self, steps_per_second: float) -> None:
        self._seconds = 1 / steps_per_second if steps_per_second else 0.0
        self._inbox: queue.SimpleQueue[tuple[Sequence[Request], Sink] | set[int]] = (
            queue.SimpleQueue()
        )
        self._random = random.Random(0)
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        self._inbox.put((requests, sink))

    def abort(self, request_ids: Iterable[int]) -> None:
        self._inbox.put(set(request_ids))

    def _run(self) -> None:
        left: dict[int, int] = {}  # request -> tokens to come
        sink = None
        due = time.perf_counter()
        while True:
            while not left or not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, set):
                    left = {key: count for key, count in left.items() if key not in message}
                else:
                    requests, sink = message
                    left |= {r.request_id: r.max_total_tokens - r.num_tokens for r in requests}
            tokens = self._random.choices(TOKEN_IDS, k=len(left))
            outputs = [
                TokenOutput(key, [token], finish_reason="length" if left[key] == 1 else None)
                for key, token in zip(left, tokens, strict=True)
            ]
            assert sink is not None
            sink.put(outputs)
            due = max(due, time.perf_counter() - self._seconds) + self._seconds
            time.sleep(max(0.0, due - time.perf_counter()))
            left = {key: count - 1 for key, count in left.items() if count > 1}


def count_events(address: tuple[str, int], num_clients: int, num_tokens: int) -> dict[str, float]:
    """Ask `num_clients` times at once and read every stream to its end."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    selector, num_events, num_open, num_bytes = selectors.DefaultSelector(), 0, num_clients, 0
    tails: dict[socket.socket, bytes] = {}
    for _ in range(num_clients):
        sock = socket.create_connection(address)
        sock.sendall(head + body)
        selector.register(sock, selectors.EVENT_READ)
        tails[sock] = b""
    started = time.perf_counter()
    while num_open:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            data = sock.recv(1 << 18)
            num_bytes += len(data)
            text = tails[sock] + data
            num_events += text.count(b'"choices":[{')
            if b"data: [DONE]" in text or not data:
                selector.unregister(sock)
                num_open -= 1
            tails[sock] = text[-11:]  # shorter than what is looked for
    seconds = time.perf_counter() - started
    return {"events": num_events, "seconds": seconds, "bytes": num_bytes}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100  # user and system time, in ticks of 10 ms


def measure(args: argparse.Namespace, model: str) -> None:
    events = queue.SimpleQueue()
    server = ServerConfig(port=0)
    with listen(server) as listener:
        port = listener.getsockname()[1]
        front_end = FrontEndProcess(listener, events)
    settings = make_settings(server, model, port, {}).to_json()
    description = describe(EngineConfig(model=model, device="cpu"))
    told = describe_model(description.config, description.model_config)
    front_end.link.send(encode_json(SETTINGS, {"settings": settings, "model": told}))
    front_end.link.send(encode_json(READY, {"num_kv_blocks": 1}))
    front_end.link.start_reading(FakeLoop(args.steps_per_second))
    threading.Thread(target=beat, args=(front_end,), daemon=True).start()
    wait_for(("127.0.0.1", port))
    for num_clients in args.clients:
        before = cpu_seconds(front_end.pid)
        command = [sys.executable, __file__, "--count-at", str(port)]
        command += ["--clients", str(num_clients), "--tokens", str(args.tokens)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        busy = cpu_seconds(front_end.pid) - before
        assert found["events"] == num_clients * args.tokens, "tokens were lost"
        print(json.dumps(report(num_clients, found, busy)), flush=True)
    front_end.close()


def beat(front_end: FrontEndProcess) -> None:
    while True:
        front_end.link.try_send(encode_state(EngineState()))
        time.sleep(0.25)


def wait_for(address: tuple[str, int]) -> None:
    request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while True:
        with socket.create_connection(address) as sock:
            sock.sendall(request)
            if b" 200 " in sock.recv(1 << 16):
                return
        time.sleep(0.1)


def report(num_clients: int, found: dict[str, float], busy: float) -> dict[str, object]:
    return {
        "clients": num_clients,
        "tokens": int(found["events"]),
        "seconds": round(found["seconds"], 2),
        "tokens_per_second": round(found["events"] / found["seconds"]),
        "front_end_cpu_us_per_token": round(busy / found["events"] * 1e6, 1),
        "bytes_per_token": round(found["bytes"] / found["events"]),
        "python": platform.python_version(),
        "uvicorn": version("uvicorn"),
        "machine": platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--steps-per-second", type=float, default=0, help="0: as many as are taken")
    parser.add_argument("--count-at", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count_at is not None:
        print(json.dumps(count_events(("127.0.0.1", args.count_at), args.clients[0], args.tokens)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        measure(args, str(write_checkpoint(Path(folder), CheckpointSpec(num_experts=0))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
