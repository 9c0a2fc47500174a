"""The HTTP driver against a fake server: times, counts, failures of every kind, concurrency."""

import asyncio
import re
import socket
from itertools import pairwise

import pytest

from ernie_engine.bench.connection import Address
from ernie_engine.bench.http import HttpDriver, served_models, server_facts
from ernie_engine.bench.metrics import RequestLog
from ernie_engine.bench.targets import ServerOptions, server_target
from ernie_engine.bench.workload import PlannedRequest, WorkloadSpec
from ernie_engine.text.tokenizer import load_tokenizer
from tests.bench.fake_server import (
    DONE,
    STREAM,
    FakeServer,
    chunk,
    event,
    plain,
    token,
    usage,
    well,
)

PLANNED = PlannedRequest([5, 6, 7], output_len=4)


def driver(server: FakeServer, **fields) -> HttpDriver:
    values = {"address": Address.from_url(server.url), "model": "m", "fields": {"temperature": 0.0}}
    return HttpDriver(**{**values, **fields})


def ask(answer, **fields) -> RequestLog:
    with FakeServer(answer) as server:
        return driver(server, **fields).run([PLANNED], None, lambda _: None).logs[0]


def test_a_request_is_what_was_planned_and_its_log_is_what_came():
    with FakeServer() as server:
        told: list[RequestLog] = []
        run = driver(server, api_key="k").run([PLANNED], None, told.append)
    assert server.requests == [
        {
            "model": "m",
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer k"
    (log,) = run.logs
    assert told == [log] and log.error is None
    assert (log.num_input_tokens, log.num_output_tokens, len(log.token_times)) == (3, 4, 4)
    assert log.ttft > 0.004 and min(log.itl) >= 0 and log.e2el > 0.018
    assert log.e2el <= run.duration


def test_empty_text_counts_as_a_chunk_and_usage_does_not():
    async def answer(_):
        yield STREAM + chunk(b": keep-alive\n\n")
        yield token("")
        await asyncio.sleep(0.02)
        yield token("b")
        await asyncio.sleep(0.3)
        yield usage(7, cached_tokens=2) + DONE

    log = ask(answer)
    assert len(log.token_times) == 2 and log.error is None
    assert 0.015 < log.e2el - log.ttft < 0.25  # the last token, not the usage after it
    assert (log.num_output_tokens, log.num_cached_tokens) == (7, 2)


def test_without_usage_the_text_is_tokenized(tiny):
    async def answer(_):
        yield STREAM + token("Hello") + token(" world") + DONE

    tokenizer = load_tokenizer(tiny)
    assert tokenizer is not None
    log = ask(answer, tokenizer=tokenizer)
    assert log.error is None
    assert log.num_output_tokens == len(tokenizer.encode("Hello world"))
    error = ask(answer).error
    assert error is not None and "--tokenizer" in error


def sends(*data: bytes):
    async def answer(_):
        for part in data:
            yield part

    return answer


BAD = {
    "refused": (sends(plain("400 Bad Request", {"error": {"message": "no"}})), "status 400.*no"),
    "error frame": (sends(STREAM, token(), chunk(event({"error": {"message": "oh"}})), DONE), "oh"),
    "cut short": (sends(STREAM, token()), "closed in the midst"),
    "no [DONE]": (sends(STREAM, token(), usage(1), b"0\r\n\r\n"), "DONE"),
    "no token": (sends(STREAM, usage(0), DONE), "without a token"),
    "no JSON": (sends(STREAM, chunk(b"data: {oops\n\n")), "JSONDecodeError"),
    "no object": (sends(STREAM, chunk(b"data: [1]\n\n")), "no JSON object"),
    "no HTTP": (sends(b"SSH-2.0\r\n\r\n"), "ValueError"),
    "nothing": (sends(), "IncompleteReadError"),
    "bad framing": (sends(STREAM, b"zz\r\n"), "ValueError"),
}


@pytest.mark.parametrize(("answer", "message"), BAD.values(), ids=BAD)
def test_a_failure_is_logged_as_one(answer, message):
    log = ask(answer)
    assert log.error is not None
    assert re.search(message, log.error)


def test_one_failure_among_many_is_its_own():
    async def answer(request):
        failing = sends(plain("503 Service Unavailable", {}))
        parts = failing if request["max_tokens"] == 1 else sends(STREAM, token(), usage(1), DONE)
        async for part in parts(request):
            yield part

    requests = [PlannedRequest([1], output_len) for output_len in (2, 1, 2)]
    with FakeServer(answer) as server:
        logs = driver(server).run(requests, None, lambda _: None).logs
    assert [log.error is None for log in logs] == [True, False, True]


def test_a_server_that_hangs_is_given_up():
    async def answer(_):
        yield STREAM
        await asyncio.sleep(30)

    log = ask(answer, timeout_s=0.1)
    assert log.error is not None and "Timeout" in log.error


def test_nobody_at_the_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = Address.from_url(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ValueError, match="no server answers"):
            served_models(address, None)
        log = HttpDriver(address, "m", {}).run([PLANNED], None, lambda _: None).logs[0]
    assert log.error is not None and "Connect" in log.error


@pytest.mark.parametrize("limit", [1, 3, None])
def test_concurrency_is_bounded_and_used(limit):
    async def answer(request):
        while server.most_open < (limit or 9):
            await asyncio.sleep(0.001)
        async for part in well(request):
            yield part

    with FakeServer(answer) as server:
        run = driver(server, timeout_s=5.0).run([PLANNED] * 9, limit, lambda _: None)
    assert server.most_open == (limit or 9)
    assert len(run.completed) == 9
    if limit == 1:  # what waits for its turn has not been sent yet
        sent = sorted((log.sent, log.token_times[-1]) for log in run.logs)
        assert all(a[1] < b[0] for a, b in pairwise(sent))


def test_requests_are_sent_at_their_arrivals():
    requests = [PlannedRequest([1], 1, arrival) for arrival in (0.0, 0.1, 0.15)]
    with FakeServer() as server:
        logs = driver(server).run(requests, None, lambda _: None).logs
    sent = [log.sent - logs[0].sent for log in logs]
    assert sent[1] > 0.08 and 0.13 < sent[2] < 1.0


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://localhost:30000", "localhost", 30000, "/v1"),
        ("http://localhost:30000/", "localhost", 30000, "/v1"),
        ("http://localhost:30000/v1/", "localhost", 30000, "/v1"),
        ("https://example.org/api/v3", "example.org", 443, "/api/v3"),
        ("http://[::1]:8000/v1", "::1", 8000, "/v1"),
    ],
)
def test_base_urls(url, host, port, path):
    address = Address.from_url(url)
    assert (address.host, address.port, address.path) == (host, port, path)
    assert (address.tls is not None) == url.startswith("https")


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://localhost", "http://"])
def test_a_bad_base_url_is_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        Address.from_url(url)


# --- finding out about a server ---

SPEC = WorkloadSpec(num_prompts=2, max_input_len=8, max_output_len=8)


def test_the_served_model_and_its_folder_are_found(tiny):
    entry = {"id": "tiny", "root": str(tiny), "max_model_len": 16}
    pages = {"/v1/models": {"data": [entry]}, "/version": {"version": "1"}}
    with FakeServer(pages=pages) as server:
        target = server_target(server.url, None, ServerOptions(), SPEC, {})
        assert server_facts(Address.from_url(server.url), None) == {
            "version": {"version": "1"},
            "info": None,
        }
        with pytest.raises(ValueError, match="max_model_len=16"):
            longer = WorkloadSpec(max_input_len=8, max_output_len=9)
            server_target(server.url, None, ServerOptions(), longer, {})
    assert target.title == f"tiny at {server.url}"
    assert 2 not in target.ids and 600 in target.ids


def test_without_a_folder_the_vocabulary_must_be_given():
    with FakeServer() as server:
        with pytest.raises(ValueError, match="--tokenizer FOLDER"):
            server_target(server.url, None, ServerOptions(), SPEC, {})
        options = ServerOptions(model="other", vocab_size=10)
        target = server_target(server.url, "k", options, SPEC, {})
    assert target.ids.tolist() == list(range(10))
    assert target.title.startswith("other at http")


def test_a_server_without_models_is_refused():
    with FakeServer(pages={}) as server, pytest.raises(ValueError, match="names no model"):
        server_target(server.url, None, ServerOptions(), SPEC, {})
