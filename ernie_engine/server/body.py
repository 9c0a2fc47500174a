"""The body of a request: bytes from the socket -> one JSON object, within limits.

Owns the limits of size, time and depth, and the strictness of the parser. Knows no field.
"""

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.requests import Request

from ernie_engine.server.errors import ApiError, bad_request, shorten

MAX_BODY_BYTES = 32 << 20
MAX_BODY_SECONDS = 60.0
MAX_DEPTH = 100

# Never fails where a quote stands, also at the end of a cut text: so it is linear.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_body(request: Request) -> bytes:
    """The whole body of a JSON request; ApiError if it is of another type, too large, too slow."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "Content-Type must be application/json.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    chunks, size = [], 0
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {MAX_BODY_SECONDS:.0f} s.") from error
    return b"".join(chunks)


def _too_large() -> ApiError:
    return ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; ApiError if there is none. Of equal keys the last one counts."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8: byte {error.start}.") from error
    _check_depth(text)
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise bad_request(f"The body is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:  # a number is too long or not finite
        raise bad_request(f"The body cannot be read: {shorten(str(error), 200)}") from error
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object.")
    if _SURROGATE.search(text):
        _check_surrogates(data)
    return data


def _check_depth(text: str) -> None:
    """Takes the innermost pairs of brackets away, at most MAX_DEPTH times: nothing recurses."""
    brackets = _NOT_BRACKETS.sub("", _STRING.sub("", text))
    for _ in range(MAX_DEPTH):
        fewer = brackets.replace("[]", "").replace("{}", "")
        if fewer == brackets:
            return  # all paired, or not JSON: the parser will say
        brackets = fewer
    if brackets:
        raise bad_request(f"The body is nested deeper than {MAX_DEPTH}.")


def _check_surrogates(data: dict[str, Any]) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise bad_request("The body holds a lone surrogate, which is no character.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text, 40)} is too large for a number")
    return value
