"""Starting, draining and dying: everybody is answered and no process is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.processes import is_alive
from tests.server.process import SMALL, Served
from tests.server.sse import COMPLETIONS
from tests.server.test_disconnects import ask, read_until

SLOW = """
import sys, time
from ernie_engine.model.runner import ModelRunner
launch = ModelRunner.launch
def slowly(self, plan):
    time.sleep({seconds})
    {then}
    return launch(self, plan)
ModelRunner.launch = slowly
sys.path.insert(0, "scripts")
import serve
sys.exit(serve.main())
"""


RECORDING = """
import pathlib, sys, time
sys.path[:0] = [".", "scripts"]
from ernie_engine.model.recording import GraphMaker
from tests.recorder import record_by_rerunning
record_by_rerunning(setattr)
make = GraphMaker.make
def slowly(self, *step):
    if not pathlib.Path({hurry!r}).exists():
        time.sleep(0.5)
    return make(self, *step)
GraphMaker.make = slowly
import serve
sys.exit(serve.main())
"""


def recording_server(tiny, tmp_path) -> Served:
    """One that would record for a quarter of a minute, or until there is a file `hurry`."""
    script = tmp_path / "recording.py"
    script.write_text(RECORDING.format(hurry=str(tmp_path / "hurry")))
    return Served(tiny, tmp_path / "log", "--max-num-seqs", "100", script=script)


def slow_server(tiny, tmp_path, *flags, seconds=0.02, then="pass") -> Served:
    """One whose steps take a while, so that something is open when the signal comes."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(seconds=seconds, then=then))
    return Served(tiny, tmp_path / "log", *flags, script=script)


def rest_of(sock: socket.socket) -> bytes:
    text = b""
    while part := sock.recv(65536):
        text += part
    return text


def body(num_tokens: int, stream: bool = True) -> dict:
    return {"prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}


def wait_status(served, path: str, status: int) -> None:
    deadline = time.monotonic() + 5
    while served.http.get(path).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_answers_while_its_graphs_are_recorded(tiny, tmp_path):
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with recording_server(tiny, tmp_path) as served:
        first = served.complete("The engine", **fields).json()["choices"][0]["text"]
        assert "CUDA graphs:" not in served.text, "all are recorded"
        (tmp_path / "hurry").touch()
        served.wait_text("CUDA graphs: 35 recorded in")
        served.wait_metric("cuda_graph_captures_total", 35)
        assert served.complete("The engine", **fields).json()["choices"][0]["text"] == first
        served.signal(signal.SIGTERM)
        assert served.wait_end() == 0


def test_a_server_may_be_ended_before_its_graphs_are_recorded(tiny, tmp_path):
    with recording_server(tiny, tmp_path) as served:
        served.signal(signal.SIGTERM)
        assert served.wait_end() == 0
        assert "CUDA graphs:" not in served.text


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tiny, tmp_path):
    with slow_server(tiny, tmp_path) as served:
        streaming = ask(served, COMPLETIONS, body(40))
        whole = ask(served, COMPLETIONS, body(40, stream=False))
        read_until(streaming, b'"choices":[{')
        served.signal(signal.SIGTERM)
        wait_status(served, "/ready", 503)
        assert served.http.get("/health").status_code == 200
        refused = served.complete("x")
        assert refused.status_code == 503 and 1 <= int(refused.headers["retry-after"]) <= 59
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert served.metric("admission_rejections_total", reason="draining") == 1
        rest = rest_of(streaming)
        assert rest.count(b'"finish_reason":"length"') == 1 and b"[DONE]" in rest
        answer = json.loads(rest_of(whole).partition(b"\r\n\r\n")[2])
        assert answer["usage"]["completion_tokens"] == 40
        ended = time.monotonic()
        assert served.wait_end() == 0
        assert time.monotonic() - ended < 6  # nothing is open: it does not wait for the 10 s


def check_ended_with_error(stream: bytes, whole: bytes, status: int) -> None:
    frames = stream.split(b"data: ")
    assert b"[DONE]" in frames[-1]
    error = json.loads(frames[-2].split(b"\n\n")[0])["error"]
    assert error["code"] == status and set(error) == {"message", "type", "param", "code"}
    head, _, text = whole.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
    assert json.loads(text)["error"]["code"] == status


@pytest.mark.parametrize("how", ["timeout", pytest.param("second signal", marks=pytest.mark.slow)])
def test_what_does_not_finish_in_time_ends_with_an_error(tiny, tmp_path, how):
    seconds = "0.3" if how == "timeout" else "60"
    with slow_server(tiny, tmp_path, "--shutdown-timeout", seconds, seconds=0.05) as served:
        streaming = ask(served, COMPLETIONS, body(400))
        whole = ask(served, COMPLETIONS, body(400, stream=False))
        read_until(streaming, b'"choices":[{', 2)
        started = time.monotonic()
        served.signal(signal.SIGTERM)
        if how == "second signal":
            wait_status(served, "/ready", 503)
            served.signal(signal.SIGTERM)
        check_ended_with_error(rest_of(streaming), rest_of(whole), 503)
        assert served.wait_end() == 0
        assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_terminal_interrupts_both_processes_and_still_drains(tiny, tmp_path):
    with slow_server(tiny, tmp_path) as served:
        streaming = ask(served, COMPLETIONS, body(30))
        read_until(streaming, b'"choices":[{')
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(served.front_end, number)
        served.signal(signal.SIGINT)
        assert b"[DONE]" in rest_of(streaming)
        assert served.wait_end() == 0


@pytest.mark.parametrize("victim", ["engine", "front end"])
def test_kill_of_either_process_ends_the_other(tiny, tmp_path, victim):
    with slow_server(tiny, tmp_path) as served:
        streaming = ask(served, COMPLETIONS, body(400))
        whole = ask(served, COMPLETIONS, body(400, stream=False))
        read_until(streaming, b'"choices":[{', 2)
        if victim == "engine":
            served.process.kill()
            check_ended_with_error(rest_of(streaming), rest_of(whole), 500)
            served.process.wait(10)
        else:
            os.kill(served.front_end, signal.SIGKILL)
            assert served.process.wait(15) == 1
        deadline = time.monotonic() + 10
        while is_alive(served.front_end) or is_alive(served.process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(httpx.ConnectError):
            served.http.get("/health")


def test_an_engine_that_fails_answers_everybody_and_exits(tiny, tmp_path):
    then = "if plan.step_id > 20: raise RuntimeError('the card is on fire')"
    with slow_server(tiny, tmp_path, then=then) as served:
        streaming = ask(served, COMPLETIONS, body(400))
        whole = ask(served, COMPLETIONS, body(400, stream=False))
        check_ended_with_error(rest_of(streaming), rest_of(whole), 500)
        assert served.wait_end() == 1
        assert "the card is on fire" in served.text  # in the log, not in an answer


@pytest.mark.slow
def test_health_tells_of_a_stuck_step_and_of_a_silent_engine(tiny, tmp_path):
    then = "time.sleep(2.5 if plan.step_id == 3 else 0)"
    with slow_server(tiny, tmp_path, "--stall-timeout", "0.5", then=then) as served:
        streaming = ask(served, COMPLETIONS, body(10))
        wait_status(served, "/health", 503)
        problem = served.http.get("/ready").json()["error"]["message"]
        assert "no step has ended" in problem
        read_until(streaming, b"[DONE]")
        wait_status(served, "/health", 200)


def test_signal_while_loading(tiny, tmp_path):
    """It ends at once and leaves no front end."""
    script = tmp_path / "loading.py"
    script.write_text(
        "import sys, time\nimport ernie_engine.server.engine_process as e\n"
        "def load(*_):\n    print('loading', flush=True)\n    time.sleep(60)\n"
        "e.EngineCore = load\nsys.path.insert(0, 'scripts')\nimport serve\nsys.exit(serve.main())\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), "--model", str(tiny), "--port", str(port), *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        deadline = time.monotonic() + 30
        while True:
            try:
                answers = [httpx.get(f"http://127.0.0.1:{port}{p}") for p in ("/ready", "/health")]
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert [a.status_code for a in answers] == [503, 200]
        assert "being loaded" in answers[0].text
        process.terminate()
        assert process.wait(10) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/ready")
