"""What the server says of itself: models, health, readiness, version, load, configuration, metrics.

Owns their answers; starts nothing and changes nothing.
"""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ernie_engine.server.errors import not_offered, unavailable
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.served import ServedModel
from ernie_engine.version import VERSION

_BUILD = ("torch", "triton", "fastapi", "uvicorn", "pydantic")


class InfoRoutes:
    def __init__(self, front: FrontEnd):
        self._front = front

    async def models(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        cards = [self._card(name, served) for name in self._front.settings.model_names]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        return JSONResponse(
            self._card(self._front.model_name(request.path_params["model"]), served)
        )

    def _card(self, name: str, served: ServedModel) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._front.created,
            "owned_by": "ernie_engine",
            "root": self._front.settings.model,
            "parent": None,
            "max_model_len": served.config.max_model_len,
            "permission": [],
        }

    async def health(self, request: Request) -> Response:
        """200 while the engine moves, or has nothing to do; also while draining."""
        problem = self._front.problem()
        return Response() if problem is None else unavailable(problem).response()

    async def ready(self, request: Request) -> Response:
        problem = self._front.not_ready() or self._front.problem()
        return Response() if problem is None else unavailable(problem).response()

    async def version(self, request: Request) -> JSONResponse:
        return JSONResponse({"version": VERSION})

    async def load(self, request: Request) -> JSONResponse:
        return JSONResponse({"server_load": self._front.num_active})

    async def info(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        config = {**asdict(served.config), "model": self._front.settings.model_names[0]}
        return JSONResponse(
            {
                "version": VERSION,
                "system_fingerprint": served.fingerprint,
                "config": config,
                "num_kv_blocks": self._front.num_kv_blocks,
                "kernels": self._front.kernels,
                "build": {name: version(name) for name in _BUILD},
            }
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._front.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def not_offered(self, request: Request) -> Response:
        raise not_offered(request.url.path)
