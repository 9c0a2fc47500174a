"""Values whose form no type can tell well: prompts, stop strings, biases, messages.

Owns what is said about a wrong one and how many there may be. Knows no call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_engine.engine.intake import Message
from ernie_engine.server.errors import ApiError, bad_request
from ernie_engine.server.protocol import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_DIGITS = 18


def read_messages(messages: Any) -> Sequence[Message]:
    """The messages, an unknown role as `user`: a template could drop it silently."""
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: expected a list with at least one message.", "messages")
    if len(messages) > MAX_MESSAGES:
        found = f"messages: list length {len(messages)} exceeds the maximum {MAX_MESSAGES}."
        raise bad_request(found, "messages")
    return [
        {**m, "role": "user"} if isinstance(m, dict) and _is_unknown_role(m.get("role")) else m
        for m in messages
    ]


def _is_unknown_role(role: object) -> bool:
    return isinstance(role, str) and role not in _ROLES and role != ""


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """One text or list of ids, or a list of them -> a list of them."""
    if prompt is None or prompt in ("", [], [[]], [""]):
        raise _empty_prompt()
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise bad_request("prompt: expected text or token ids, or a list of them.", "prompt")
    if not isinstance(prompt[0], str | list):
        return [_ids(prompt)]
    if len(prompt) > MAX_PROMPTS:
        found = f"prompt list length {len(prompt)} exceeds the maximum {MAX_PROMPTS}."
        raise bad_request(found, "prompt")
    kind = type(prompt[0])
    if not all(isinstance(one, kind) for one in prompt):
        raise bad_request("prompt: expected only texts or only lists of token ids.", "prompt")
    if not all(prompt):
        raise _empty_prompt()
    return prompt if kind is str else [_ids(one) for one in prompt]


def _ids(values: list[Any]) -> list[Any]:
    """Integral floats are integers; what else is wrong, the engine says."""
    if not any(isinstance(value, float) for value in values):
        return values
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def _empty_prompt() -> ApiError:
    return bad_request("The prompt must be provided and non-empty.", "prompt")


def read_stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise bad_request("stop: expected a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS or not all(0 < len(one) <= MAX_STOP_CHARS for one in stops):
        allowed = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        raise bad_request(f"stop: {allowed} are allowed.", "stop")
    return tuple(stops)


def read_biases(given: Any, vocab_size: int) -> Mapping[int, float]:
    """{token id as text: number}; values beyond +-100 are cut."""
    given = {} if given is None else given
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        found = f"logit_bias: expected an object with at most {MAX_BIASES} token ids."
        raise bad_request(found, "logit_bias")
    bad = [k for k, v in given.items() if not (_is_token_id(k, vocab_size) and _is_number(v))]
    if bad:
        expected = f"a token id from 0 to {vocab_size - 1} with a number"
        found = f"logit_bias: not {expected}: {', '.join(map(repr, bad))}"
        raise bad_request(found, "logit_bias")
    return {int(k): float(min(100, max(-100, v))) for k, v in given.items()}


def _is_token_id(key: str, vocab_size: int) -> bool:
    is_integer = key.isascii() and key.isdigit() and len(key) <= _MAX_DIGITS
    return is_integer and int(key) < vocab_size


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
