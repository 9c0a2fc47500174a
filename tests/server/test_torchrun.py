"""Two torchrun agents serve together; a rank that dies or stops is named and all end."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from tests.processes import is_alive
from tests.server.process import ENVIRONMENT, ROOT
from tests.server.torchrun import Agents, free_port

LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


class Reader(threading.Thread):
    """Reads a stream to its end; `error` is how it ended."""

    def __init__(self, client: openai.OpenAI, model: str):
        super().__init__(daemon=True)
        self._client, self._model = client, model
        self.num_chunks, self.error, self.flows = 0, None, threading.Event()

    def run(self) -> None:
        try:
            for _ in self._client.completions.create(
                model=self._model, prompt=[5, 6, 7], stream=True, **LONG
            ):
                self.num_chunks += 1
                self.flows.set()
        except (openai.APIError, httpx.TransportError) as error:
            self.error = error


@pytest.fixture(
    params=[["--tensor-parallel-size", "2"], ["--pipeline-parallel-size", "2"]], ids=str
)
def layout(request):
    return request.param


@pytest.mark.slow
def test_two_agents_serve_an_openai_client_and_drain(tiny, tmp_path, layout):
    with Agents(tiny, tmp_path, *layout, "--debug") as agents:
        client, model = agents.client(), str(tiny)
        answer = client.completions.create(model=model, prompt=[5, 6, 7], **LONG)
        assert answer.usage.completion_tokens == 400
        with client.completions.create(model=model, prompt=[5], stream=True, **LONG) as stream:
            for _, _chunk in zip(range(3), stream, strict=False):
                pass  # and hangs up
        again = client.completions.create(model=model, prompt=[5, 6, 7], temperature=0, **LONG)
        assert again.usage.completion_tokens == 400
        agents.wait(lambda: "num_requests_running{" in agents.http.get("/metrics").text, 5)
        for agent in agents.agents:
            agent.send_signal(signal.SIGTERM)
        agents.wait_end()
        assert "shutting down; running requests get" in agents.text
        assert "rank 1 waits for rank 0" in agents.text and "ERROR" not in agents.text


def read_until_flowing(agents: Agents, model: str) -> Reader:
    reader = Reader(agents.client(), model)
    reader.start()
    assert reader.flows.wait(30)
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_lost_rank_is_named_and_everything_ends(tiny, tmp_path, layout, rank, number):
    with Agents(tiny, tmp_path, *layout) as agents:
        reader = read_until_flowing(agents, str(tiny))
        pid = agents.rank(rank)
        began = time.monotonic()
        os.kill(pid, number)
        names = rf"rank 1 \(\S+, pid {pid}\)" if rank == 1 else r"rank 1 ends: rank 0 \(\S+\)"
        lost = re.compile(f"{names} has (ended|not been heard of)")
        agents.wait(lambda: lost.search(agents.text), 11)
        assert time.monotonic() - began < 10.5
        reader.join(15)
        assert not reader.is_alive() and reader.error is not None
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert agents.http.get("/health").status_code == 200
        assert all(agents.wait_end())
        assert not is_alive(pid)


@pytest.mark.slow
def test_with_c10d_the_service_comes_back_by_itself(tiny, tmp_path):
    with Agents(tiny, tmp_path, "--pipeline-parallel-size", "2", rdzv=True) as agents:
        reader = read_until_flowing(agents, str(tiny))
        os.kill(agents.rank(1), signal.SIGKILL)
        reader.join(20)
        assert not reader.is_alive() and reader.error is not None
        agents.wait_ready()
        answer = agents.client().completions.create(model=str(tiny), prompt=[5], **LONG)
        assert answer.usage.completion_tokens == 400
        agents.started = agents.processes()
        for agent in agents.agents:
            agent.send_signal(signal.SIGTERM)
        agents.wait_end()


RETRY = """
import sys
from ernie_engine import Engine
try:
    Engine(sys.argv[1], device="cpu", tensor_parallel_size=3)
except ValueError:
    pass
with Engine(sys.argv[1], device="cpu", tensor_parallel_size=2, max_model_len=64) as engine:
    if engine.rank == 0:
        engine.generate([[5]], use_tqdm=False)
"""


@pytest.mark.slow
def test_a_program_that_asked_for_what_cannot_be_can_ask_again(tiny, tmp_path):
    script = tmp_path / "retry.py"
    script.write_text(RETRY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(script), str(tiny)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_an_idle_hour_is_survived(tiny, tmp_path):
    """With time-outs of seconds: longer than each of them nothing happens, and all goes on."""
    flags = ["--distributed-timeout-seconds", "20", "--peer-timeout-seconds", "3"]
    with Agents(tiny, tmp_path, "--pipeline-parallel-size", "2", *flags) as agents:
        time.sleep(25)
        answer = agents.client().completions.create(model=str(tiny), prompt=[5], **LONG)
        assert answer.usage.completion_tokens == 400
