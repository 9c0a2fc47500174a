"""The rules of the stream: framing, roles, finish, usage, and that it folds to the whole answer."""

import itertools
import json
import time

import pytest

from ernie_engine.server.rendering import fold
from tests.server.sse import CHAT, COMPLETIONS, read_stream, whole_and_stream

USER = [{"role": "user", "content": "Hello"}]
SEEDED = {"seed": 7, "temperature": 1.0, "ignore_eos": True}

FEATURES = {
    "plain": {},
    "n": {"n": 3},
    "stop": {"stop": ["a", "e ", "in"], "max_tokens": 40},
    "stop included": {"stop": ["e"], "include_stop_str_in_output": True, "max_tokens": 40},
    "ids": {"return_token_ids": True},
    "special tokens": {"skip_special_tokens": False, "logit_bias": {"2": 4}},
    "logprobs": {"logprobs": 2, "n": 2},
    "one token": {"max_tokens": 1},
    "end of sequence": {"ignore_eos": False, "logit_bias": {"2": 3}, "max_tokens": 60},
}
ONLY_COMPLETIONS = {
    "echo": {"echo": True},
    "echo, logprobs": {"echo": True, "logprobs": 3, "n": 3},
    "echo alone": {"echo": True, "logprobs": 1, "max_tokens": 0, "return_token_ids": True},
    "prompts": {"prompt": [[5, 6, 7], [300], [301, 302]], "n": 2, "echo": True, "logprobs": 0},
    "texts": {"prompt": ["Hello", "The"], "echo": True},
    "prompt scores": {"prompt_logprobs": 0, "n": 2},
}


def fold_stream(events: list[dict]) -> dict:
    """What a client has that adds everything up."""
    by_index: dict[int, list[dict]] = {}
    for event in events:
        for choice in event["choices"]:
            by_index.setdefault(choice["index"], []).append(choice)
    return {index: fold(choices) for index, choices in by_index.items()}


def close(a, b) -> bool:
    """Equal, but for the last digits of log-probabilities: what ran beside them may differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-4
    return a == b


@pytest.mark.parametrize("name", [*FEATURES, *ONLY_COMPLETIONS])
def test_a_completion_is_the_fold_of_its_stream(served, name):
    fields = {**FEATURES, **ONLY_COMPLETIONS}[name]
    body = {"prompt": "The engine", "max_tokens": 12, **SEEDED, **fields}
    whole, events = whole_and_stream(served, COMPLETIONS, body)
    folded = fold_stream(events)
    assert close([folded[choice["index"]] for choice in whole["choices"]], whole["choices"])
    assert len(folded) == len(whole["choices"])
    check_events(whole, events, hidden=body["max_tokens"] == 0)


@pytest.mark.parametrize("name", FEATURES)
def test_a_chat_answer_is_the_fold_of_its_stream(served, name):
    fields = dict(FEATURES[name])
    if "logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": 2}
    body = {"messages": USER, "max_tokens": 12, **SEEDED, **fields}
    whole, events = whole_and_stream(served, CHAT, body)
    folded = fold_stream(events)
    for choice in whole["choices"]:
        found = dict(folded[choice["index"]])
        found["message"] = found.pop("delta")
        assert close(found, choice)
    check_events(whole, events, hidden=False)
    for index in folded:
        deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == index]
        with_role = [i for i, delta in enumerate(deltas) if "role" in delta]
        first_text = next((i for i, d in enumerate(deltas) if d["content"]), len(deltas) - 1)
        assert with_role == [first_text]  # once, with the first text, never alone before it


def check_events(whole: dict, events: list[dict], hidden: bool) -> None:
    """One event a token, one choice an event, one finish a choice and it is the last."""
    assert all(len(event["choices"]) == 1 for event in events)
    assert all("usage" not in event for event in events)
    num_tokens = whole["usage"]["completion_tokens"]
    assert len(events) == (len(whole["choices"]) if hidden else num_tokens)
    for choice in whole["choices"]:
        reasons = [
            e["choices"][0]["finish_reason"]
            for e in events
            if e["choices"][0]["index"] == choice["index"]
        ]
        assert all(reason is None for reason in reasons[:-1])
        assert reasons[-1] in ("stop", "length")
    same = {"id", "created", "model", "object", "system_fingerprint"}
    assert len({tuple((k, e[k]) for k in sorted(same)) for e in events}) == 1


def test_usage_comes_when_it_is_asked_for(served):
    body = {"messages": USER, "max_tokens": 5, "n": 2, **SEEDED}
    whole = served.http.post(CHAT, json=body).json()["usage"]
    assert whole["completion_tokens"] == 10
    *events, last = read_stream(served, CHAT, {**body, "stream_options": {"include_usage": True}})[
        0
    ]
    assert last["choices"] == [] and last["usage"] | {"prompt_tokens_details": 0} == whole | {
        "prompt_tokens_details": 0
    }
    assert all("usage" not in event for event in events)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = read_stream(served, CHAT, {**body, "stream_options": options})[0]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == list(range(1, 11)) and last["usage"]["completion_tokens"] == 10
    on_finish = {"X-Usage-On-Finish": "1"}
    asked = {**body, "n": 1, "stream_options": {"include_usage": True}}
    *events, last = read_stream(served, CHAT, asked, headers=on_finish)[0]
    assert ["usage" in event for event in events] == [False] * 4 + [True]
    assert events[-1]["usage"] == last["usage"]


def test_cached_tokens_count_once_a_prompt(served):
    prompt = list(range(100, 160))
    body = {"prompt": [prompt, prompt], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    served.complete(**body)
    details = served.complete(**body).json()["usage"]
    assert details["prompt_tokens"] == 120
    assert details["prompt_tokens_details"] == {"cached_tokens": 96}  # 3 of 4 blocks of 16 each


def test_line_separators_and_half_characters_never_go_out_raw(served):
    """read_stream decodes as ASCII; here the text has what readers could break on."""
    pieces = "\u0085\u2028\u2029é🙂"
    tokens = served.http.post("/tokenize", json={"prompt": pieces}).json()["tokens"]
    body = {"prompt": tokens, "echo": True, "max_tokens": 1, "temperature": 0}
    whole, events = whole_and_stream(served, COMPLETIONS, body)
    assert whole["choices"][0]["text"].startswith(pieces)
    assert events[0]["choices"][0]["text"].startswith(pieces)


def test_tokens_arrive_while_the_answer_is_made(served):
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    times = []
    with served.http.stream("POST", COMPLETIONS, json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    assert len(times) == 400
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] < times[-1] - 0.1 and max(gaps) < (times[-1] - times[0]) / 2


def test_fold_takes_linear_time_and_keeps_nulls():
    parts = [
        {"text": "ab", "logprobs": {"tokens": [i]}, "finish_reason": None} for i in range(50_000)
    ]
    started = time.perf_counter()
    whole = fold([*parts, {"text": "c", "logprobs": None, "finish_reason": "stop"}])
    assert time.perf_counter() - started < 2
    assert whole["text"] == "ab" * 50_000 + "c" and len(whole["logprobs"]["tokens"]) == 50_000
    assert whole["finish_reason"] == "stop"
    assert fold([{"a": None}, {"a": None}]) == {"a": None} and fold([]) == {}
    assert fold([fold(parts[:9]), fold(parts[9:])]) == fold(parts)


def test_the_body_of_a_whole_answer_is_one_line_of_json(served):
    answer = served.complete("Hello", max_tokens=3)
    assert answer.headers["content-type"] == "application/json"
    assert set(json.loads(answer.content)) == {
        *("id", "object", "created", "model", "system_fingerprint", "choices", "usage")
    }
