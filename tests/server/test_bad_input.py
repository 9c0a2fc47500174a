"""Bad input by the hundred: a 4xx with the right body, and the next good request is answered."""

import itertools
import json
import random
import socket

import pytest

from ernie_engine.server.fields import NOT_OFFERED as FIELDS_NOT_OFFERED
from ernie_engine.server.protocol import ChatCompletionRequest, CompletionRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def good_request_after(served):
    """What every test here ends with."""
    yield
    answer = served.complete([5, 6, 7], max_tokens=2, temperature=0, ignore_eos=True)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    assert served.process.poll() is None


def check(response, status: int, *parts: str, param: str | None = "any") -> None:
    """The error shape, a bounded body, and words that name what is wrong."""
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) - {"reason"} == {"message", "type", "param", "code"}
    assert error["code"] == status and error["type"].endswith("Error")
    assert len(response.content) < 4000
    for part in parts:
        assert part in error["message"], error["message"]
    if param != "any":
        assert error["param"] == param
    assert not any(word in response.text for word in ("Traceback", "site-packages", "0x7"))
    assert response.headers["x-request-id"]


BODIES = {
    "empty": b"",
    "cut": b'{"prompt": "x", ',
    "no object": b"[1, 2]",
    "text": b'"prompt"',
    "null": b"null",
    "two values": b'{"prompt": "x"} {}',
    "comment": b'{"prompt": "x" /* */}',
    "single quotes": b"{'prompt': 'x'}",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "minus Infinity": b'{"prompt": "x", "top_p": -Infinity}',
    "too large a number": b'{"prompt": "x", "temperature": 1e400}',
    "too long a number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "encoded surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a key": b'{"prompt": "x", "\\udfff": 1}',
    "lone surrogate in stop": b'{"prompt": "x", "stop": ["\\udc00"]}',
    "control character": b'{"prompt": "a\nb"}',
    "deep": b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}",
    "very deep": b"[" * 200_000,
    "deep and open": b'{"a":' * 100_000,
    "deep objects": b'{"a":' * 101 + b"1" + b"}" * 101,
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "nul": b"\0",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_malformed_bodies(served, path, name):
    check(served.http.post(path, content=BODIES[name], headers=JSON), 400)


def test_depth_at_its_bound(served):
    for depth, status in ((99, 200), (100, 400)):
        deep = b'{"a":' * depth + b'"[{"' + b"}" * depth
        body = b'{"prompt": "x", "max_tokens": 1, "metadata": ' + deep + b"}"
        answer = served.http.post(COMPLETIONS, content=body, headers=JSON)
        assert answer.status_code == status, answer.text


def test_quotes_and_backslashes_cost_linear_time(served):
    for body in (b'{"prompt": "' + b'\\"' * 500_000, b'{"prompt": "' + b"\\" * 999_999):
        check(served.http.post(COMPLETIONS, content=body, headers=JSON, timeout=5), 400)


WRONG = ["hot", [], {}, [1], {"a": 1}, True, "1"]
NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"]
NUMBERS += ["repetition_penalty", "top_k", "seed", "n", "max_tokens", "min_tokens"]
FLAGS = ["stream", "ignore_eos", "echo", "skip_special_tokens", "return_token_ids"]


@pytest.mark.parametrize("field", [*NUMBERS, "prompt_logprobs", "logprobs"])
def test_wrong_types_for_numbers(served, field):
    for value in WRONG:
        check(served.complete("x", **{field: value}), 400, field, param=field)


@pytest.mark.parametrize("field", [*FLAGS, "include_stop_str_in_output"])
def test_wrong_types_for_flags(served, field):
    for value in ("true", 1, 0, [], {}, 1.0):
        check(served.complete("x", **{field: value}), 400, field, param=field)


OUT_OF_BOUNDS = {
    "temperature": [-0.1, 2.1, 1e308, 10**400],
    "top_p": [0, -1, 1.1],
    "top_k": [-2, 2.5, 1 << 31],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 101],
    "seed": [1 << 63, -(1 << 63) - 1, 0.5, 1e300],
    "n": [0, -1, 129, 1.5, 10**12],
    "max_tokens": [-1, 1.5, 1 << 40, 0],
    "min_tokens": [-1, 17, 1 << 40],
    "logprobs": [-1, 21, 10**9],
    "prompt_logprobs": [-1, 21],
    "stop": ["", ["a", ""], [1], {}, 5, ["x"] * 17, "y" * 1025],
    "stop_token_ids": [5, ["a"], [-1], [700], [1.5], [1] * 129],
    "stream_options": [5, "x", {"include_usage": 1}],
}


@pytest.mark.parametrize("field", OUT_OF_BOUNDS)
def test_values_out_of_bounds(served, field):
    for value in OUT_OF_BOUNDS[field]:
        check(served.complete("x", **{field: value}), 400, field)
    for value in (1 << 63, -(1 << 63) - 1):
        check(served.complete("x", seed=value), 400, "_than_equal")


def test_bounds_themselves_are_accepted(served):
    for fields in (
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1, "repetition_penalty": 100},
        {"seed": (1 << 63) - 1, "presence_penalty": -2, "frequency_penalty": 2},
        {"seed": -1, "logprobs": 20, "prompt_logprobs": 20, "temperature": 1e-300},
        {"n": 8, "max_tokens": 2.0, "min_tokens": 2, "stop": ["x" * 1024] * 16},
        {"stop_token_ids": [699] * 128, "repetition_penalty": 0.01, "top_k": 2**31 - 1},
        {"max_tokens": 2**31 - 1, "stop": "e", "seed": -(1 << 63)},
    ):
        answer = served.complete("x", **{"max_tokens": 2, **fields})
        assert answer.status_code == 200, answer.text


PROMPTS = {
    "must be provided and non-empty": [None, "", [], [""], [[]], ["a", ""], [[5], []]],
    "out of vocabulary": [[700], [-1], [[5], [5, 10**30]]],
    "prompt": [5, True, {}, [None], [1.5], [True], ["a", 5], [5, "a"], [[5], "a"], [[["a"]]]],
    "prompt list length 1025 exceeds the maximum": [["a"] * 1025],
    "This model's maximum context length is 512 tokens.": [[5] * 512, "word " * 600, "x" * 10**6],
}


@pytest.mark.parametrize("message", PROMPTS)
def test_prompts(served, message):
    for prompt in PROMPTS[message]:
        check(served.complete(prompt), 400, message)
    check(served.http.post(COMPLETIONS, json={}), 400, "must be provided and non-empty")


def test_too_long_is_said_in_the_words_that_clients_look_for(served):
    answer = served.complete([5] * 512)
    assert answer.json()["error"]["message"].startswith("This model's maximum context length is")
    assert "context_length_exceeded" in answer.text
    messages = [{"role": "user", "content": "word " * 600}]
    answer = served.http.post(CHAT, json={"messages": messages})
    check(answer, 400, "This model's maximum context length is 512 tokens.")
    assert "context_length_exceeded" in answer.text
    full = served.complete([5] * 511, max_tokens=1, ignore_eos=True)
    assert full.json()["choices"][0]["finish_reason"] == "length"
    clamped = served.complete([5] * 500, max_tokens=100, ignore_eos=True).json()
    assert clamped["usage"]["completion_tokens"] == 12


def test_logit_bias(served):
    answer = served.complete("x", logit_bias={"5": 1, "a": 1, "700": 1, "-1": 0, "9" * 30: 1})
    check(answer, 400, "'a'", "'700'", "'-1'", "'" + "9" * 30, param="logit_bias")
    for value in ([], "x", {"5": "1"}, {"5": None}, {"5": True}, {str(i): 0 for i in range(1025)}):
        check(served.complete("x", logit_bias=value), 400, "logit_bias", param="logit_bias")
    never = served.complete("x", logit_bias={"5": -(10**400)}, max_tokens=1)
    assert never.status_code == 200


MESSAGES = [
    None, "Hi", {}, [], [5], ["Hi"], [None], [{}], [{"content": "Hi"}],
    [{"role": 5, "content": "Hi"}], [{"role": "", "content": "Hi"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": {"text": "Hi"}}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "tool", "content": "5", "tool_call_id": "x"}],
    [*USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
    USER * 4097,
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(MESSAGES)))
def test_messages(served, index):
    check(served.http.post(CHAT, json={"messages": MESSAGES[index]}), 400, "messages")


def test_unknown_roles_and_fields_within_messages_are_taken(served):
    for message in (
        {"role": "narrator", "content": "Hi"},
        {"role": "user", "content": "Hi", "name": "x", "mood": {"a": [1]}},
        {"role": "developer", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ):
        answer = served.http.post(CHAT, json={"messages": [message, *USER], "max_tokens": 1})
        assert answer.status_code == 200, answer.text


NOT_OFFERED = {
    COMPLETIONS: {"suffix": "x", "best_of": 2, "use_beam_search": True, "top_logprobs": 3},
    CHAT: {"tools": [], "tool_choice": "auto", "echo": True, "chat_template": "x", "n": "two"},
    None: {
        "response_format": {"type": "json_object"},
        "structured_outputs": {"json": {}},
        "guided_json": {},
        "allowed_token_ids": [5],
        "bad_words": ["x"],
        "truncate_prompt_tokens": 5,
        "cache_salt": "x",
        "priority": 1,
    },
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_known_fields_that_are_not_offered_are_named(served, path):
    for field, value in {**NOT_OFFERED[path], **NOT_OFFERED[None]}.items():
        body = {"prompt": "x", "messages": USER, field: value}
        check(served.http.post(path, json=body), 400, field, param=field)


def test_harmless_and_unknown_fields(served):
    harmless = {"user": "me", "store": True, "metadata": {}, "service_tier": "auto"}
    nothing = {"best_of": 1, "tools": None, "logprobs": None, "stop": [], "bad_words": []}
    nothing |= {"response_format": {"type": "text"}, "use_beam_search": False, "priority": 0}
    answer = served.complete("x", max_tokens=1, **harmless, **nothing)
    assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers
    unknown = {f"field_{i}": 1 for i in range(30)} | {"bad\r\nname: x": 1, "x" * 500: 1}
    answer = served.complete("x", max_tokens=1, n_predict=5, **unknown)
    assert answer.status_code == 200
    header = answer.headers["x-ignored-fields"]
    assert header.startswith("n_predict, field_0, ") and len(header) < 1000


def test_combinations(served):
    for fields, message in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens=3 is above max_tokens=2"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ):
        check(served.complete("x", **fields), 400, message)
    for fields in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 1}):
        answer = served.http.post(CHAT, json={"messages": USER, **fields})
        check(answer, 400, list(fields)[-1])


def test_models_and_paths_and_methods(served):
    for name in ("nope", "x" * 10_000, "../etc", ""):
        check(served.complete("x", model=name), 404, "does not exist", param="model")
    check(served.complete("x", model=5), 400, "model", param="model")
    for path in ("/", "/v1", "/v2/models", "/v1/models/nope", "/%00", "/v1/completions/x"):
        check(served.http.get(path), 404)
    answer = served.http.get(COMPLETIONS)
    check(answer, 405)
    assert answer.headers["allow"] == "POST"
    check(served.http.delete("/v1/models"), 405)
    for path in ("/v1/embeddings", "/v1/responses", "/v1/messages"):
        answer = served.http.post(path, json={})
        check(answer, 501)
        assert answer.headers["x-should-retry"] == "false"


def test_content_types_and_sizes(served):
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"):
        answer = served.http.post(COMPLETIONS, content=b"{}", headers={"Content-Type": kind})
        check(answer, 415)
    typed = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    assert served.http.post(COMPLETIONS, content=body, headers=typed).status_code == 200
    large = b'{"prompt": "' + b"x" * (32 << 20) + b'"}'
    check(served.http.post(COMPLETIONS, content=large, headers=JSON), 413)
    parts = itertools.repeat(b"x" * 65536, 600)  # chunked: no length is declared
    check(served.http.post(COMPLETIONS, content=parts, headers=JSON), 413)


def connect(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_declared_size_is_refused_before_it_is_sent(served):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(served) as sock:
        sock.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413")


def raw(served, data: bytes) -> bytes:
    with connect(served) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


def test_what_is_not_http(served):
    line = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for data, status in (
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"hello\r\n\r\n", b"400"),
        (line + b"A: " + b"x" * 70_000, b"431"),
        (line + b"A: b\r\n" * 129 + b"\r\n", b"431"),
    ):
        head, _, body = raw(served, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status), head[:200]
        assert json.loads(body)["error"]["code"] == int(status)


def test_an_error_is_never_much_larger_than_what_caused_it(served):
    for body in (
        {"prompt": "x", "stop_token_ids": ["y" * 1000] * 100},
        {"prompt": ["z" * 100_000, 5]},
        {"prompt": [["q" * 100_000]]},
        {"prompt": "x", "logit_bias": {"k" * 90_000: 1}},
        {"messages": [{"role": "x" * 100_000, "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "w" * 100_000}]}]},
    ):
        path = CHAT if "messages" in body else COMPLETIONS
        check(served.http.post(path, json=body), 400)


def test_tokenizer_routes(served):
    def post(path, **fields):
        return served.http.post(path, json=fields)

    check(post("/tokenize"), 400, "prompt")
    check(post("/tokenize", prompt="x", messages=USER), 400, "prompt")
    check(post("/tokenize", prompt=5), 400, "prompt")
    check(post("/tokenize", messages=[{"role": 5}]), 400, "messages")
    check(post("/tokenize", prompt="x", model="nope"), 404)
    check(post("/detokenize", tokens=[5, 700]), 400, "tokens[1]", "out of vocabulary")
    check(post("/detokenize", tokens=[-1]), 400, "tokens[0]")
    check(post("/detokenize", tokens=["a"]), 400, "tokens[0]")
    check(post("/detokenize"), 400, "tokens")


POOL = [None, True, False, 0, 1, -1, 2.5, 1e308, 10**30, "", "x", "\u2028", [], [0], ["x"], [[]]]
POOL += [{}, {"a": None}, {"type": "text"}, [None], [True], [{}], 699, "5", [[5, 6]], {"5": 1}]


def test_random_requests_never_fail_the_server(served):
    """Seeded; every field there is, with values from everywhere."""
    rng = random.Random(3)
    statuses = set()
    for i in range(400):
        model, path = ((ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETIONS))[i % 2]
        names = sorted({*model.model_fields, *FIELDS_NOT_OFFERED, "user", "unknown"})
        body = {name: rng.choice(POOL) for name in rng.sample(names, rng.randrange(4))}
        body = {"prompt": [5, 6], "messages": USER, "max_tokens": 2, **body}
        answer = served.http.post(path, json=body)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            check(answer, answer.status_code)
    assert statuses == {200, 400, 404}
