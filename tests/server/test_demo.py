"""scripts/demo.py: it waits as long as a server needs, asks, and leaves none behind."""

import contextlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.processes import ROOT
from tests.scripts import load_script

SCRIPT = ROOT / "scripts" / "demo.py"


@pytest.fixture
def demo():
    return load_script("demo")


def test_a_server_that_is_slow_to_answer_is_asked_again(demo, monkeypatch):
    """Its port takes connections before anybody reads what they ask."""
    answers = iter([ConnectionRefusedError(), TimeoutError("timed out"), contextlib.nullcontext()])

    def urlopen(url, timeout):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(demo.urllib.request, "urlopen", urlopen)
    demo._wait_until_ready(SimpleNamespace(poll=lambda: None), 1)
    assert next(answers, None) is None


def test_a_server_that_ends_is_not_waited_for(demo):
    with pytest.raises(SystemExit, match="status 2"):
        demo._wait_until_ready(SimpleNamespace(poll=lambda: 2, returncode=2), 1)


def test_a_conversation(tiny):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--model", tiny, "--port", port, "--max-tokens", 4, "Hello!", "And now?"]
    done = subprocess.run(
        [sys.executable, *map(str, [SCRIPT, *flags])], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "> Hello!" in done.stdout and done.stdout.count(" tokens; first after ") == 2
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
