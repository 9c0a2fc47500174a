"""What the routes share: settings, the served model, the engine, and whether work is taken.

Owns the admission of new work. Holds no request.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from ernie_engine.server.admission import Admission
from ernie_engine.server.client import EngineClient
from ernie_engine.server.errors import MAX_ECHO_CHARS, ApiError, shorten, unavailable
from ernie_engine.server.metrics import Metrics
from ernie_engine.server.served import ServedModel
from ernie_engine.server.settings import Settings

TEXT_THREADS = 2  # long prompts being tokenized at once
T = TypeVar("T")


class FrontEnd:
    """Shared by the routes; `served` is None until the engine has loaded its model."""

    def __init__(self, settings: Settings, client: EngineClient, metrics: Metrics):
        self.settings, self.client, self.metrics = settings, client, metrics
        server = settings.server
        self.admission = Admission(
            server.max_num_queued_reqs, server.max_num_queued_tokens, metrics
        )
        self.served: ServedModel | None = None
        self.num_kv_blocks = 0
        self.kernels: Mapping[str, str] = {}  # op -> implementation
        self.created = int(time.time())
        self.is_draining = False
        self.num_active = 0  # calls for answers, from their first byte to their last
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")

    def serve(self, served: ServedModel, num_kv_blocks: int, kernels: Mapping[str, str]) -> None:
        """From now on work is taken."""
        self.served, self.num_kv_blocks, self.kernels = served, num_kv_blocks, kernels
        self.metrics.cache_config = {
            "block_size": str(served.config.block_size),
            "num_gpu_blocks": str(num_kv_blocks),
            "enable_prefix_caching": str(served.config.enable_prefix_caching),
            "gpu_memory_utilization": str(served.config.gpu_memory_utilization),
        }

    @contextmanager
    def active_call(self) -> Iterator[None]:
        """Counts a call for answers while it lasts."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """For work on texts that may be long: the event loop goes on meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)

    def not_ready(self) -> str | None:
        """Why no new work is taken; None if it is."""
        if self.is_draining:
            return "The server is shutting down."
        return "The model is being loaded." if self.served is None else None

    def problem(self) -> str | None:
        """Why the engine cannot be called alive; None if it can, or is still loading."""
        if self.served is None:
            return None
        return self.client.problem(self.settings.server.stall_timeout)

    def require_model(self) -> ServedModel:
        """The served model; ApiError 503 before it is loaded."""
        if self.served is None:
            self.metrics.rejected["not_ready"] += 1
            raise unavailable("The model is being loaded.", retry_after=5)
        return self.served

    def require_ready(self) -> ServedModel:
        """The served model; ApiError 503 if no new work is taken."""
        if self.is_draining:
            self.metrics.rejected["draining"] += 1
            raise unavailable("The server is shutting down.", retry_after=5)
        return self.require_model()

    def model_name(self, asked: str | None) -> str:
        """The name that was asked for; ApiError 404 if no such model is served."""
        names = self.settings.model_names
        if asked is not None and asked not in names:
            shown = shorten(asked, MAX_ECHO_CHARS)
            raise ApiError(404, f"The model `{shown}` does not exist.", param="model")
        return names[0] if asked is None else asked
