"""Reading server-sent events as bytes, to see what client packages hide."""

import json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def read_stream(served, path: str, body: dict, **options) -> tuple[list[dict], list[str]]:
    """(events without [DONE], all lines). Checks the framing."""
    with served.http.stream("POST", path, json={**body, "stream": True}, **options) as response:
        assert response.status_code == 200, response.read()
        headers = response.headers
        text = b"".join(response.iter_raw()).decode("ascii")
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
    frames = text.split("\n\n")
    assert frames.pop() == "" and frames[-1] == "data: [DONE]"
    events = [f for f in frames[:-1] if not f.startswith(":")]
    assert all(f.startswith("data: ") and "\n" not in f for f in events)
    return [json.loads(f.removeprefix("data: ")) for f in events], frames


def whole_and_stream(served, path: str, body: dict) -> tuple[dict, list[dict]]:
    whole = served.http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    return whole.json(), read_stream(served, path, body)[0]
