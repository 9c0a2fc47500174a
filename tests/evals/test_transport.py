"""The URL answerer against a local server, and the engine answerer against a stand-in."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest

from ernie_engine.evals.transport import EngineAnswerer, UrlAnswerer


class Handler(BaseHTTPRequestHandler):
    """Answers with the last message in capitals; refuses the word "fail"."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))  # type: ignore
        text = body["messages"][-1]["content"]
        content = text.upper() if text else None
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(400 if text == "fail" else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_url_answers_in_order(server: ThreadingHTTPServer):
    ask = UrlAnswerer(f"http://127.0.0.1:{server.server_port}/v1/", "tiny", "key", concurrency=3)
    texts = [f"word {i}" for i in range(9)]
    assert ask([user(text) for text in texts], 7) == [text.upper() for text in texts]
    path, authorization, body = server.seen[0]  # type: ignore
    assert (path, authorization) == ("/v1/chat/completions", "Bearer key")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 7)


def test_no_content_is_an_empty_answer(server: ThreadingHTTPServer):
    assert UrlAnswerer(f"http://127.0.0.1:{server.server_port}/v1", "t")([user("")], 1) == [""]


def test_an_http_error_is_raised(server: ThreadingHTTPServer):
    ask = UrlAnswerer(f"http://127.0.0.1:{server.server_port}/v1", "t")
    with pytest.raises(HTTPError):
        ask([user("fail")], 1)


def test_only_http():
    with pytest.raises(ValueError, match="base_url"):
        UrlAnswerer("file:///etc", "t")


def test_engine_is_asked_greedily():
    asked = []

    def chat(conversations: list, params: dict, use_tqdm: bool) -> list:
        asked.append((conversations, params))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=str(i))]) for i in range(2)]

    ask = EngineAnswerer(SimpleNamespace(chat=chat), dict)
    assert ask([user("a"), user("b")], 5) == ["0", "1"]
    assert asked == [([user("a"), user("b")], {"temperature": 0.0, "max_tokens": 5})]
