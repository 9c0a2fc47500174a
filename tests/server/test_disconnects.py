"""Clients that leave, at any moment: their requests end and their blocks are free again."""

import json
import socket
import time
from pathlib import Path

import pytest

from tests.server.process import Served
from tests.server.sse import CHAT, COMPLETIONS

USER = [{"role": "user", "content": "Hello"}]
LONG = {"max_tokens": 480, "ignore_eos": True}


def connect(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def ask(served, path: str, body: dict) -> socket.socket:
    """Sends a request and does not read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock = connect(served)
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def read_until(sock: socket.socket, mark: bytes, count: int = 1) -> bytes:
    text = b""
    while text.count(mark) < count:
        part = sock.recv(65536)
        assert part, text
        text += part
    return text


ANYTHING_LLM = {  # its generic OpenAI provider: a chat that streams
    "messages": [{"role": "system", "content": "Given the following conversation, ..."}, *USER],
    "temperature": 0.7,
    "max_tokens": 1024,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def test_anything_llm_chats_and_stops(served):
    """It lists models, streams to the first finish_reason, and closes the socket to abort."""
    (model,) = served.http.get("/v1/models").json()["data"]
    assert model["id"] and model["owned_by"]
    body = {"model": model["id"], **ANYTHING_LLM, "ignore_eos": True}
    sock = ask(served, CHAT, {**body, "max_tokens": 8})
    text = read_until(sock, b"[DONE]")
    assert text.startswith(b"HTTP/1.1 200") and text.count(b'"finish_reason":"length"') == 1
    assert text.count(b'"usage":{') == 1
    sock.close()
    aborted = served.metric("request_success_total", finished_reason="abort")
    sock = ask(served, CHAT, body)
    read_until(sock, b'"choices":[{', 3)
    sock.close()
    served.wait_idle()
    assert served.metric("request_success_total", finished_reason="abort") == aborted + 1
    whole = {**ANYTHING_LLM, "model": model["id"], "max_tokens": 4, "stream": False}
    del whole["stream_options"]
    message = served.http.post(CHAT, json=whole).json()["choices"][0]["message"]
    assert message["role"] == "assistant" and isinstance(message["content"], str)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["body", "sent", "prefill", "decode", "queued"])
def test_a_closed_socket_ends_the_request(served, moment, stream):
    body = {"prompt": list(range(20, 420)), **LONG, "max_tokens": 100, "n": 2, "stream": stream}
    blockers = []
    if moment == "queued":  # all 8 slots are taken
        blockers = [ask(served, COMPLETIONS, {"prompt": "x", "n": 8, **LONG}) for _ in range(2)]
        while served.metric("num_requests_running") < 8:
            time.sleep(0.01)
    if moment == "body":
        sock = connect(served)
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b'Content-Type: application/json\r\nContent-Length: 999\r\n\r\n{"prompt": "x'
        )
    else:
        sock = ask(served, COMPLETIONS, body)
    if moment == "decode" and stream:
        read_until(sock, b'"choices":[{', 4)
    elif moment in ("decode", "queued"):
        time.sleep(0.2)
    elif moment == "prefill":
        time.sleep(0.02)
    for open_socket in (sock, *blockers):
        open_socket.close()
    served.wait_idle()
    assert served.complete("x", max_tokens=1).status_code == 200


@pytest.mark.slow
def test_a_slow_reader_is_let_go_and_holds_nobody_up(served):
    """It asks for more than the sockets' buffers take, and reads nothing."""
    body = {"prompt": [5, 6], "n": 64, "logprobs": 20, "stream": True, **LONG}
    sock = ask(served, COMPLETIONS, body)
    started = time.monotonic()
    answer = served.complete("x", max_tokens=2)
    assert answer.status_code == 200
    sock.close()
    served.wait_idle()
    assert time.monotonic() - started < 30


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_two_hundred_clients_that_leave(tiny, tmp_path):
    """The issue's own: 200 clients ask for thousands of tokens and leave after 0.5 s; then one
    request is answered within 5 s, nothing is left behind, and memory stays flat."""
    with Served(tiny, tmp_path / "log") as served:

        def wave() -> None:
            bodies = ({"prompt": [i % 600, 7], "max_tokens": 10_000} for i in range(200))
            streams = (i % 2 == 0 for i in range(200))
            socks = [
                ask(served, COMPLETIONS, {**body, "ignore_eos": True, "stream": stream})
                for body, stream in zip(bodies, streams, strict=True)
            ]
            time.sleep(0.5)
            for sock in socks:
                sock.close()
            started = time.monotonic()
            assert served.complete("x", max_tokens=4, timeout=5).status_code == 200
            assert time.monotonic() - started < 5
            served.wait_idle()

        for _ in range(3):
            wave()
        pids = served.front_end, served.process.pid
        before = [(memory(pid), num_descriptors(pid)) for pid in pids]
        for _ in range(10):
            wave()
        after = [(memory(pid), num_descriptors(pid)) for pid in pids]
        for (memory_before, fds_before), (memory_after, fds_after) in zip(
            before, after, strict=True
        ):
            assert memory_after < memory_before + (8 << 20)
            assert fds_after <= fds_before + 2
        assert served.metric("request_success_total", finished_reason="abort") >= 13 * 190
