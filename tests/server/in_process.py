"""A front end without processes: its application called directly, its engine a recorder."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from ernie_engine.engine.core import describe
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.engine_config import EngineConfig
from ernie_engine.framing import kind_of
from ernie_engine.server.app import make_app
from ernie_engine.server.client import EngineClient
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.metrics import Metrics
from ernie_engine.server.served import describe_model, read_served_model
from ernie_engine.server.settings import ServerConfig, make_settings
from ernie_engine.server.wire import REQUESTS, StepFrame, decode_abort, decode_requests


class Recorder:
    """In the place of the socket's writer: what the front end told the engine."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.aborted: list[int] = []

    def write(self, data: bytes) -> None:
        payload = data[4:]
        if kind_of(payload) == REQUESTS:
            self.requests += decode_requests(payload)
        else:
            self.aborted += decode_abort(payload)

    def is_closing(self) -> bool:
        return False


class InProcess:
    """`http` calls the application; `step` plays the engine."""

    def __init__(self, model: Path, keys: Sequence[str] = (), **server: Any):
        config = ServerConfig(api_key=tuple(keys), **server)
        settings = make_settings(config, str(model), 30000, {})
        self.engine = Recorder()
        self.metrics = Metrics(config.metrics_prefix, settings.model_names[0])
        client = EngineClient(self.engine, self.metrics, config.sse_keep_alive)  # type: ignore[arg-type]
        self.front = FrontEnd(settings, client, self.metrics)
        description = describe(EngineConfig(model=str(model), device="cpu"))
        told = describe_model(description.config, description.model_config)
        self.front.serve(read_served_model(told), num_kv_blocks=256, kernels={"linear": "torch"})
        self.app = make_app(self.front)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def step(self, *outputs: TokenOutput) -> None:
        self.front.client.take_step(StepFrame(outputs))

    @contextlib.asynccontextmanager
    async def asked(self, path: str = "/v1/completions", **body: Any):
        """A call under way: yields (its task, the ids of its requests)."""
        before = len(self.engine.requests)
        task = asyncio.create_task(self.http.post(path, json=body))
        while len(self.engine.requests) == before:
            await asyncio.sleep(0.001)
        try:
            yield task, [request.request_id for request in self.engine.requests[before:]]
        finally:
            task.cancel()


def get(model: Path, path: str, *, headers: dict | None = None, **server: Any) -> httpx.Response:
    """One GET of an application made for it."""
    here = InProcess(model, **server)
    return asyncio.run(here.http.get(path, headers=headers))
