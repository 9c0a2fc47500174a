"""A served checkpoint in processes of its own, and what tests ask of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import AsyncOpenAI, OpenAI

from ernie_engine.server.engine_process import HEARTBEAT_SECONDS
from tests.processes import is_alive

ROOT = Path(__file__).parents[2]
SMALL = ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(4 << 20), "--device", "cpu"]
START_SECONDS = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ERNIE_API_KEY": ""}


def sample(text: str, name: str, **labels: str) -> float:
    """Of what /metrics tells: the sum of a metric's samples that have these labels."""
    total, found = 0.0, False
    for line in text.splitlines():
        match = re.fullmatch(r"([^{ ]+)(\{.*\})? (\S+)", line)
        if match is None or match[1].split(":")[-1] != name:
            continue
        if all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            total, found = total + float(match[3]), True
    assert found, f"no metric {name} {labels}"
    return total


class Served:
    """`scripts/serve.py` on any free port; use it in a `with` block."""

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *flags: str,
        script: Path | None = None,
        start_seconds: float = START_SECONDS,
    ):
        self.log, self.model = log, str(model)
        command = [sys.executable, str(script or ROOT / "scripts" / "serve.py"), "--port", "0"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--model", self.model, *SMALL, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                cwd=ROOT,
            )
        self._wait(
            lambda: "\nReady." in self.text or self.process.poll() is not None, start_seconds
        )
        assert self.process.poll() is None, self.text
        found = re.search(r"base URL +(\S+)/v1\n", self.text)
        assert found is not None, self.text
        self.url = found[1]
        self.front_end = self._child()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def client(self, **options) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "EMPTY", "max_retries": 0, **options}
        )

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0)

    def complete(self, prompt, **fields) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """As sample(), of now."""
        return sample(self.http.get("/metrics").text, name, **labels)

    def wait_text(self, text: str, seconds: float = 10.0) -> None:
        """Of its log."""
        self._wait(lambda: text in self.text, seconds)

    def wait_metric(self, name: str, value: float, seconds: float = 5.0) -> None:
        """For what the engine process counts: the front end hears of it a little later."""
        self._wait(lambda: self.metric(name) == value, seconds)

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Nothing runs, nothing waits, no block is held."""
        time.sleep(2 * HEARTBEAT_SECONDS)  # what was told before this call does not count
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        self._wait(lambda: not any(self.metric(name) for name in names), seconds)
        assert self.http.get("/load").json() == {"server_load": 0}

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_end(self, seconds: float = 20.0) -> int:
        """The exit status, once no process is left."""
        status = self.process.wait(seconds)
        self._wait(lambda: not is_alive(self.front_end), seconds)
        return status

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGTERM)  # no wait for what a failed test left open
        try:
            self.wait_end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self, is_so, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.text[-3000:]}"
            time.sleep(0.02)

    def _child(self) -> int:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (child,) = map(int, children)
        return child

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
