"""The application: the table of routes, and what happens to errors.

A route that is not in the table does not exist; /openapi.json is made from the same table.
"""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ernie_engine.server import answers, protocol
from ernie_engine.server.errors import ApiError, generation_failed
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.gate import Gate
from ernie_engine.server.openapi import Route, build_document
from ernie_engine.server.routes_generation import GenerationRoutes
from ernie_engine.server.routes_info import InfoRoutes
from ernie_engine.server.routes_text import TextRoutes

_UNSERVED = ("embeddings", "responses", "messages", "moderations", "images/generations", "rerank")
_UNSERVED = (*_UNSERVED, "audio/speech", "audio/transcriptions", "files", "batches")


def make_app(front: FrontEnd) -> ASGIApp:
    """Every route of the server, behind the gate."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    table = [*_generation(front), *_text(front), *_info(front)]
    document = build_document(table)

    async def openapi(request: Request) -> JSONResponse:
        return JSONResponse(document)

    for route in [*table, Route("GET", "/openapi.json", openapi), *_unserved(front)]:
        for path in (route.path, *route.aliases):
            app.add_api_route(path, route.handler, methods=[route.method], response_model=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _fault)
    origins = front.settings.server.allowed_origins
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    return Gate(app, front.settings, front.metrics)


def _generation(front: FrontEnd) -> list[Route]:
    """Aliases without /v1: people paste base URLs wrongly."""
    routes = GenerationRoutes(front)
    return [
        Route(
            "POST",
            "/v1/chat/completions",
            routes.chat_completions,
            asks=protocol.ChatCompletionRequest,
            answers=answers.ChatCompletion,
            streams=answers.ChatCompletionChunk,
            aliases=["/chat/completions"],
        ),
        Route(
            "POST",
            "/v1/completions",
            routes.completions,
            asks=protocol.CompletionRequest,
            answers=answers.Completion,
            streams=answers.CompletionChunk,
            aliases=["/completions"],
        ),
    ]


def _text(front: FrontEnd) -> list[Route]:
    routes = TextRoutes(front)
    asks, asks_back = protocol.TokenizeRequest, protocol.DetokenizeRequest
    return [
        Route("POST", "/tokenize", routes.tokenize, asks, answers.Tokens),
        Route("POST", "/detokenize", routes.detokenize, asks_back, answers.Detokenized),
        Route("GET", "/tokenizer_info", routes.tokenizer_info, answers=answers.TokenizerInfo),
    ]


def _info(front: FrontEnd) -> list[Route]:
    routes = InfoRoutes(front)
    model, models = routes.model, routes.models
    one = "/models/{model:path}"
    return [
        Route("GET", "/v1/models", models, answers=answers.ModelList, aliases=["/models"]),
        Route("GET", f"/v1{one}", model, answers=answers.ModelCard, aliases=[one]),
        Route("GET", "/health", routes.health, aliases=["/ping"]),
        Route("GET", "/ready", routes.ready),
        Route("GET", "/version", routes.version, answers=answers.Version),
        Route("GET", "/load", routes.load, answers=answers.Load),
        Route("GET", "/info", routes.info, answers=answers.Info),
        Route("GET", "/metrics", routes.metrics, is_text=True),
    ]


def _unserved(front: FrontEnd) -> list[Route]:
    """Of OpenAI's API: a client that was pointed here by mistake is told so."""
    handler = InfoRoutes(front).not_offered
    return [
        Route(method, f"/v1/{name}", handler) for name in _UNSERVED for method in ("GET", "POST")
    ]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_exception(request: Request, error: Exception) -> Response:
    """No route, or no such method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return ApiError(404, "There is nothing at this path.").response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _client_gone(request: Request, error: Exception) -> Response:
    """Within its own body; nobody reads this."""
    return Response(status_code=400)


async def _fault(request: Request, error: Exception) -> Response:
    return generation_failed(request.state.request_id).response()
