"""The front end with an engine that the test plays: faults, limits, silence, speculation."""

import asyncio
import json
import time

import pytest
from triton import knobs

from ernie_engine.engine.core import EngineCore, describe
from ernie_engine.engine.plan import TokenLogprobs
from ernie_engine.engine.request import TokenOutput
from ernie_engine.engine_config import EngineConfig
from ernie_engine.server import client as client_module
from ernie_engine.server.engine_process import Supervisor
from ernie_engine.server.errors import ApiError
from ernie_engine.server.session import MAX_QUEUED_PIECES, Choice
from ernie_engine.server.wire import EngineState, decode_state, encode_state
from tests.server.in_process import InProcess
from tests.server.process import sample

PROMPT = [5, 6, 7]


def last(request_id: int, tokens=(300,)) -> TokenOutput:
    return TokenOutput(request_id, list(tokens), finish_reason="length")


@pytest.fixture
def here(tiny):
    return InProcess(tiny, max_num_queued_reqs=20, max_num_queued_tokens=100)


def test_several_tokens_a_step_are_several_events(here):
    score = TokenLogprobs(-1.0, 1, [300], [-1.0])

    async def play():
        body = {"prompt": PROMPT, "stream": True, "logprobs": 1, "max_tokens": 5}
        async with here.asked(**body) as (task, (request,)):
            here.step(TokenOutput(request, [300, 301, 302], [score] * 3))
            here.step(TokenOutput(request, [303, 304], [score] * 2, finish_reason="length"))
            return await task

    events = events_of(asyncio.run(play()).text)
    assert [len(event["logprobs"]["tokens"]) for event in events] == [1] * 5
    assert [event["finish_reason"] for event in events] == [None] * 4 + ["length"]
    assert here.metrics.counters["generation_tokens"] == 5
    assert here.metrics.histograms["iteration_tokens_total"].total == 3 + 5


def events_of(text: str) -> list[dict]:
    frames = [frame for frame in text.split("\n\n") if frame.startswith("data: {")]
    return [json.loads(frame[6:])["choices"][0] for frame in frames]


BYTE = 13  # id of the token of byte 0


def test_the_role_comes_with_the_first_text(here):
    """Half a character has none; an answer without any text has the role at its end."""

    async def play(*tokens: int):
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        async with here.asked("/v1/chat/completions", **body) as (task, (request,)):
            *first, end = tokens
            for token in first:
                here.step(TokenOutput(request, [token]))
            here.step(last(request, [end]))
            return [event["delta"] for event in events_of((await task).text)]

    first, second, third = asyncio.run(play(BYTE + 0xC3, BYTE + 0xA9, 300))
    assert first == {"content": ""} and second == {"role": "assistant", "content": "é"}
    assert third["content"] and "role" not in third
    eos = here.front.served.tokenizer.eos_token_id
    assert asyncio.run(play(eos, eos))[1] == {"role": "assistant", "content": ""}


def test_choices_wait_for_the_scores_of_their_prompt(here):
    """Only the first choice brings them; another one may be faster."""
    score = TokenLogprobs(-1.0, 1, [300], [-1.0])

    async def play():
        body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "n": 2, "max_tokens": 1}
        async with here.asked(**body) as (task, (first, second)):
            here.step(TokenOutput(second, [301], [score], finish_reason="length"))
            here.step(TokenOutput(first, prompt_logprobs=[score]))
            here.step(TokenOutput(first, prompt_logprobs=[score]))
            here.step(TokenOutput(first, [300], [score], finish_reason="length"))
            return (await task).json()["choices"]

    choices = asyncio.run(play())
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 4]
    assert [c["logprobs"]["token_logprobs"][:3] for c in choices] == [[None, -1.0, -1.0]] * 2


def test_a_long_answer_is_whole(here):
    """Longer than what is folded at once."""
    count = 2600

    async def play():
        async with here.asked(prompt=PROMPT, return_token_ids=True) as (task, (request,)):
            for i in range(count - 1):
                here.step(TokenOutput(request, [300 + i % 200]))
                await asyncio.sleep(0)
            here.step(last(request))
            return (await task).json()

    answer = asyncio.run(play())
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == count
    assert choice["token_ids"] == [300 + i % 200 for i in range(count - 1)] + [300]
    assert choice["text"] == here.front.served.tokenizer.decode(choice["token_ids"])


def test_tokens_behind_a_stop_string_appear_nowhere(here):
    tokenizer = here.front.served.tokenizer
    ids = tokenizer.encode("engine stop here")
    stop = "stop"

    async def play():
        async with here.asked(prompt=PROMPT, stop=stop, max_tokens=50) as (task, (request,)):
            here.step(TokenOutput(request, ids))
            here.step(TokenOutput(request, ids))  # in flight meanwhile
            assert here.engine.aborted == [request]
            return (await task).json()

    answer = asyncio.run(play())
    assert answer["choices"][0]["text"] == "engine "
    used = answer["usage"]["completion_tokens"]
    assert used < len(ids) and here.metrics.counters["generation_tokens"] == used
    assert here.metrics.finished == {"stop": 1, "length": 0, "abort": 0, "error": 0}


def test_a_fault_in_one_requests_text_ends_that_request_only(here, monkeypatch):
    take = Choice.take

    def break_one(self, output, frame, now):
        if output.token_ids == [666]:
            raise RuntimeError("a fault in the text")
        return take(self, output, frame, now)

    monkeypatch.setattr(Choice, "take", break_one)

    async def play():
        async with (
            here.asked(prompt=PROMPT) as (bad, (one,)),
            here.asked(prompt=PROMPT) as (good, (two,)),
        ):
            here.step(TokenOutput(one, [666]), last(two))
            assert here.engine.aborted == [one]
            return await bad, await good

    bad, good = asyncio.run(play())
    assert bad.status_code == 500 and "fault" not in bad.text and good.status_code == 200
    assert here.metrics.finished["error"] == 1
    assert here.front.admission.num_requests == here.front.admission.num_tokens == 0
    assert here.front.client.num_open == here.front.num_active == 0


def test_an_event_that_cannot_be_written_is_an_error_frame(here):
    score = TokenLogprobs(float("nan"), 1, [], [])

    async def play():
        body = {"prompt": PROMPT, "stream": True, "logprobs": 0}
        async with here.asked(**body) as (task, (request,)):
            here.step(TokenOutput(request, [300], [score]))
            return await task

    answer = asyncio.run(play())
    frames = answer.text.split("\n\n")
    error = json.loads(frames[0].removeprefix("data: "))["error"]
    assert error["code"] == 500 and answer.headers["x-request-id"] in error["message"]
    assert frames[1] == "data: [DONE]" and len(here.engine.aborted) == 1


def test_minus_infinity_is_written_as_a_number(here):
    score = TokenLogprobs(float("-inf"), 9, [301], [-0.5])

    async def play():
        async with here.asked(prompt=PROMPT, logprobs=1, max_tokens=1) as (task, (request,)):
            here.step(TokenOutput(request, [300], [score], finish_reason="length"))
            return await task

    found = asyncio.run(play()).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]


def test_a_reader_that_does_not_read_is_let_go(here):
    """Straight at the application: nobody takes what it sends."""

    async def play():
        body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 400}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        stuck, sent = asyncio.Event(), []

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if message["type"] == "http.response.body":
                await stuck.wait()

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "raw_path": b"/v1/completions"}
        task = asyncio.create_task(here.app(scope, receive, send))
        while not here.engine.requests:
            await asyncio.sleep(0.001)
        request = here.engine.requests[0].request_id
        for _ in range(MAX_QUEUED_PIECES + 1000):
            here.step(TokenOutput(request, [300]))
            await asyncio.sleep(0)
        assert here.engine.aborted == [request]
        assert here.metrics.finished["abort"] == 1
        stuck.set()
        await task
        assert b"not read fast enough" in b"".join(m.get("body", b"") for m in sent)

    asyncio.run(play())


def test_admission_counts_choices_and_unread_tokens(here):
    async def play():
        async def post(**body):
            return await here.http.post("/v1/completions", json=body)

        never = await post(prompt=["a"] * 5, n=5)
        assert never.status_code == 400 and "at most 20" in never.text
        async with here.asked(prompt=PROMPT, n=12) as (first, requests):
            refused = await post(prompt=PROMPT, n=9)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert (await post(prompt=[5] * 99)).status_code == 503  # 36 tokens wait already
            assert (await post(prompt=[5] * 101)).status_code == 400
            here.step(*(TokenOutput(request, [300]) for request in requests))
            assert here.front.admission.num_tokens == 0  # they have been read
            async with here.asked(prompt=[5] * 99) as (second, (long,)):
                here.step(last(long), *map(last, requests))
                assert (await first).status_code == (await second).status_code == 200
        assert here.metrics.rejected["requests"] == here.metrics.rejected["tokens"] == 1

    asyncio.run(play())
    assert here.front.admission.num_requests == here.front.admission.num_tokens == 0


def test_an_abort_by_the_engine_is_an_error_and_no_finish_reason(here):
    async def play():
        async with here.asked(prompt=PROMPT) as (task, (request,)):
            here.step(TokenOutput(request, finish_reason="abort"))
            return await task

    answer = asyncio.run(play())
    assert answer.status_code == 503 and "abort" not in answer.text


def test_silence_and_stalls_make_it_unhealthy(here, monkeypatch):
    front = here.front
    assert front.problem() is None
    front.client.take_state(EngineState(seconds_stalled=59.0))
    assert front.problem() is None
    front.client.take_state(EngineState(seconds_stalled=61.0))
    assert "no step has ended for 61 s" in front.problem()
    front.client.take_state(EngineState())
    assert front.problem() is None
    later = time.monotonic() + 6
    monkeypatch.setattr(client_module.time, "monotonic", lambda: later)
    assert "nothing was heard from the engine" in front.problem()
    answer = asyncio.run(here.http.get("/health"))
    assert answer.status_code == 503 and answer.json()["error"]["code"] == 503


@pytest.fixture
def core(tiny, monkeypatch):
    """An engine in whose process Triton has told of 7 kernels, as if it had recorded 3 graphs."""
    monkeypatch.setattr(knobs.compilation, "listener", None)
    core = EngineCore(describe(EngineConfig(model=str(tiny), device="cpu")))
    monkeypatch.setattr(EngineCore, "num_graphs", 3)
    for i in range(7):
        knobs.compilation.listener(src="kernel", cache_hit=i % 2 == 0)
    yield core
    core.close()


def test_metrics_tell_how_many_kernels_and_graphs_the_engine_has(here, core):
    """From the engine's process over the wire: it tells again and again."""

    def told() -> tuple[float, float]:
        state = Supervisor(core, None, None, 0.0)._state()  # type: ignore[arg-type]
        here.front.client.take_state(decode_state(encode_state(state)))
        text = asyncio.run(here.http.get("/metrics")).text
        names = "kernel_compilations_total", "cuda_graph_captures_total"
        return tuple(sample(text, name) for name in names)

    assert told() == (7, 3)
    knobs.compilation.listener(src="late", cache_hit=False)
    assert told() == (8, 3)


def test_an_engine_that_is_gone_fails_all(here):
    async def play():
        async with here.asked(prompt=PROMPT) as (task, _):
            here.front.client.fail_all(ApiError(500, "It is gone."))
            late = await here.http.post("/v1/completions", json={"prompt": PROMPT})
            return await task, late, await here.http.get("/health")

    open_one, late, health = asyncio.run(play())
    assert (open_one.status_code, late.status_code, health.status_code) == (500, 500, 503)
    assert here.front.num_active == here.front.admission.num_requests == 0


def test_a_silent_stream_gets_comments(tiny):
    here = InProcess(tiny, sse_keep_alive=0.01)

    async def play():
        async with here.asked(prompt=PROMPT, stream=True) as (task, (request,)):
            for _ in range(3):
                await asyncio.sleep(0.02)
                here.front.client.take_state(EngineState())
            await asyncio.sleep(0.01)
            here.step(last(request))
            return await task

    assert asyncio.run(play()).text.startswith(": keep-alive\n\n: keep-alive\n\n")


def test_before_the_model_is_there(here):
    here.front.served = None

    async def play():
        paths = ("/health", "/ready", "/v1/models", "/info", "/version", "/metrics")
        return [(await here.http.get(path)).status_code for path in paths]

    assert asyncio.run(play()) == [200, 503, 503, 503, 200, 200]
    answer = asyncio.run(here.http.post("/v1/completions", json={"prompt": "x"}))
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_information(here):
    async def play():
        return [(await here.http.get(path)).json() for path in ("/info", "/version", "/load")]

    info, version, load = asyncio.run(play())
    assert info["config"]["max_model_len"] == 512 and info["version"] == version["version"]
    assert info["kernels"] == {"linear": "torch"}
    assert info["num_kv_blocks"] == 256 and info["build"]["torch"] and info["system_fingerprint"]
    assert load == {"server_load": 0}
