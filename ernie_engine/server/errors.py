"""Errors as OpenAI clients read them, and how much of an error may be said.

Owns the shape, the names of the types and the limits of messages. Knows no route.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from ernie_engine.engine.intake import PromptTooLongError

MAX_PROBLEMS, MAX_MESSAGE_CHARS, MAX_ECHO_CHARS = 10, 1000, 200

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    431: "RequestHeadersTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
_FIELD = re.compile(r"([a-z_]+)((?:\[[^\]]{0,40}\]|\.[a-z_]+)*)(?=[=: ])")


class ApiError(Exception):
    """A failure to be told to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.reason = status, message, param, reason
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {
            "message": shorten(self.message, MAX_MESSAGE_CHARS),
            "type": _TYPES.get(self.status, "APIError"),
            "param": self.param,
            "code": self.status,
        }
        return {"error": error if self.reason is None else {**error, "reason": self.reason}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def unavailable(message: str, retry_after: int = 1) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(retry_after)})


def generation_failed(request_id: str) -> ApiError:
    return ApiError(500, f"The generation failed. Request id: {request_id}")


def not_offered(what: str, param: str | None = None) -> ApiError:
    """A known feature of OpenAI's API; clients shall not try again."""
    headers = {"x-should-retry": "false"}
    return ApiError(501, f"{what} is not offered by this server.", param=param, headers=headers)


def _prompt_too_long(detail: str, max_model_len: int) -> ApiError:
    """In the words that LiteLLM (the beginning) and LangChain (the reason) look for."""
    begin = f"This model's maximum context length is {max_model_len} tokens."
    return ApiError(400, f"{begin} The {detail}.", reason="context_length_exceeded")


def from_value_error(error: ValueError, fields: Collection[str], max_model_len: int) -> ApiError:
    """What the engine says about a request; its messages begin with the field's name."""
    if isinstance(error, PromptTooLongError):
        return _prompt_too_long(str(error), max_model_len)
    match = _FIELD.match(str(error))
    return bad_request(str(error), match[0] if match and match[1] in fields else None)


def from_validation(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    paths = [path_of(problem["loc"]) for problem in problems[:MAX_PROBLEMS]]
    texts = [
        shorten(f"{path}: {problem['msg']} ({problem['type']})", MAX_ECHO_CHARS)
        for path, problem in zip(paths, problems, strict=False)
    ]
    rest = len(problems) - len(texts)
    return bad_request("; ".join(texts) + (f"; and {rest} more" if rest else ""), paths[0])


def path_of(location: Sequence[int | str]) -> str:
    """("messages", 0, "role") -> messages[0].role"""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return shorten(path.removeprefix("."), MAX_ECHO_CHARS)


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
