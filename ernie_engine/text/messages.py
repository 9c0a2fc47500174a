"""The chat messages of a caller, checked and brought to the one form that templates understand.

Never renders anything and knows no template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_SAME_ROLE = {"developer": "system"}
_REASONING_FIELDS = ("thoughts", "reasoning", "reasoning_content")


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with string content, known role names and reasoning in `thoughts`.

    Text parts are joined by a newline and null becomes "", because the templates fail on a list
    or silently drop it. ValueError names the message and field that cannot be used.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    return [_normalized(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalized(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}.role: expected a role such as 'user', found {role!r}")
    result = {key: value for key, value in message.items() if value is not None}
    result["role"] = _SAME_ROLE.get(role, role)
    result["content"] = _text(message.get("content"), f"{where}.content")
    reasoning = [(f, result[f]) for f in _REASONING_FIELDS if f in result]
    if reasoning:
        field, value = reasoning[0]
        result["thoughts"] = _string(value, f"{where}.{field}")
    if not result.get("tool_calls"):
        result.pop("tool_calls", None)
    return result


def _text(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: expected a string or a list of text parts")
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"{where}: a part of type {kind!r} is not supported, only 'text' is")
    return _string(part.get("text"), f"{where}.text")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, found {type(value).__name__}")
    return value
