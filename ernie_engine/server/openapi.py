"""/openapi.json, from the table of routes and the types of requests and answers.

Owns the document's form. What it says is what the code reads and writes: the types are the same.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from ernie_engine.server.answers import ErrorResponse
from ernie_engine.server.gate import OPEN_PATHS
from ernie_engine.version import VERSION

_SCHEMAS = "#/components/schemas/"


@dataclass(frozen=True)
class Route:
    """A handler and what it reads and writes; `aliases` are not documented."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    asks: type | None = None
    answers: type | None = None  # None: an empty body, or text
    streams: type | None = None  # what an event holds, with stream: true
    aliases: Sequence[str] = ()
    is_text: bool = False


def build_document(routes: Sequence[Route]) -> dict[str, Any]:
    types = {t for r in routes for t in (r.asks, r.answers, r.streams) if t} | {ErrorResponse}
    adapters = [(t.__name__, "validation", TypeAdapter(t)) for t in sorted(types, key=str)]
    _, schemas = TypeAdapter.json_schemas(adapters, ref_template=_SCHEMAS + "{model}")  # pyright: ignore[reportArgumentType]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operations = paths.setdefault(route.path.replace(":path", ""), {})
        operations[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ernie_engine", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done."}
    content = {}
    if route.answers is not None:
        content["application/json"] = _schema(route.answers)
    if route.streams is not None:
        content["text/event-stream"] = _schema(route.streams)
    if route.is_text:
        content["text/plain"] = {"schema": {"type": "string"}}
    errors = {"description": "An error.", "content": {"application/json": _schema(ErrorResponse)}}
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "responses": {
            "200": {**answer, "content": content} if content else answer,
            "default": errors,
        },
        "security": [] if route.path in OPEN_PATHS else [{}, {"key": []}],
    }
    if route.asks is not None:
        body = {"required": True, "content": {"application/json": _schema(route.asks)}}
        operation["requestBody"] = body
    if "{model:path}" in route.path:
        model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [model]
    return operation


def _schema(kind: type) -> dict[str, Any]:
    return {"schema": {"$ref": _SCHEMAS + kind.__name__}}
