"""A checkpoint served by several ranks under torchrun agents, and what tests do to them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

from tests.processes import is_alive
from tests.server.process import ENVIRONMENT, ROOT, SMALL

START_SECONDS = 120


class Agents:
    """`num_agents` torchrun agents on this host, one rank each; use it in a `with` block.

    Rank 0 is the first agent's; with `rdzv` they meet by c10d and restart up to 3 times.
    """

    def __init__(
        self, model: Path, folder: Path, *flags: str, num_agents: int = 2, rdzv: bool = False
    ):
        self.logs = [folder / f"agent{i}.log" for i in range(num_agents)]
        self.url = f"http://127.0.0.1:{free_port()}"
        port = free_port()
        meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        if rdzv:
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            meet += ["--rdzv-id", "test", "--max-restarts", "3"]
        self.agents = []
        for i, log in enumerate(self.logs):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_agents)]
            command += ["--nproc-per-node", "1", *meet, *([] if rdzv else ["--node-rank", str(i)])]
            command += [str(ROOT / "scripts" / "serve.py"), "--model", str(model), *SMALL]
            command += ["--port", self.url.split(":")[-1], *flags]
            with log.open("wb") as file:
                agent = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT
                )
            self.agents.append(agent)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.wait_ready()
        self.started = self.processes()

    @property
    def text(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0)

    def wait_ready(self) -> None:
        self.wait(self._is_ready, START_SECONDS)

    def _is_ready(self) -> bool:
        assert all(agent.poll() is None for agent in self.agents), self.text[-5000:]
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, is_so, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.text[-5000:]}"
            time.sleep(0.05)

    def rank(self, rank: int) -> int:
        """The pid of a rank's process."""
        for pid in self.processes():
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"RANK=%d" % rank in environ and b"serve.py" in command:
                return pid
        raise AssertionError(f"no process of rank {rank}\n{self.text[-3000:]}")

    def processes(self) -> list[int]:
        """All descendants of the agents: ranks, the front end, guards."""
        return [pid for agent in self.agents for pid in descendants(agent.pid)]

    def wait_end(self, seconds: float = 60.0) -> list[int]:
        """The agents' exit statuses, once no process of theirs is left."""
        statuses = [agent.wait(seconds) for agent in self.agents]
        self.wait(lambda: not any(map(is_alive, self.started)), 5.0)
        return statuses

    def close(self) -> None:
        self.http.close()
        left = [pid for pid in {*self.started, *self.processes()} if is_alive(pid)]
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
                agent.wait()
        for pid in left:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def descendants(pid: int) -> list[int]:
    """Of threads and processes that may end meanwhile."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except FileNotFoundError:
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def named(text: str, pattern: str) -> str:
    """The first line that the pattern is found in."""
    found = re.search(f"^.*(?:{pattern}).*$", text, re.MULTILINE)
    assert found is not None, f"nothing like {pattern!r} in\n{text[-5000:]}"
    return found[0]
