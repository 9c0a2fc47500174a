"""Scorers: is an answer right? Pure functions of text. Never ask a model, a file or the network.

A scorer takes (answer, target, schema) and returns a bool; `SCORERS` names them.
"""

import json
import re
from collections.abc import Callable, Mapping

Scorer = Callable[[str, str, str], bool]

_LETTER_FIRST = re.compile(r"\W*([A-J])\b(?!')")
_LETTER_STATED = re.compile(r"\b[Aa]nswer(?: is|:)\s*\W?([A-J])\b")
_TYPES: Mapping[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
_KEYWORDS = {"type", "enum", "properties", "required", "items", "additionalProperties"}


def exact_match(answer: str, target: str) -> bool:
    """Equal up to runs of whitespace and blanks at the ends."""
    return answer.split() == target.split()


def choice_letter(answer: str) -> str | None:
    """The chosen letter A-J: the one stated as the answer last, else the one that the text begins
    with.
    """
    stated = _LETTER_STATED.findall(answer)
    if stated:
        return stated[-1]
    first = _LETTER_FIRST.match(answer)
    return first.group(1) if first else None


def boxed(answer: str) -> str | None:
    """What stands in the last closed `\\boxed{...}`, braces balanced; None without one."""
    for piece in reversed(answer.split("\\boxed{")[1:]):
        depth = 1
        for i, char in enumerate(piece):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return piece[:i].strip()
    return None


def follows_schema(value: object, schema: dict) -> bool:
    """Whether a JSON value is valid under a schema of the keywords in `_KEYWORDS`; another one is a
    ValueError.
    """
    unknown = schema.keys() - _KEYWORDS
    if unknown:
        raise ValueError(
            f"schema: keywords {sorted(unknown)} are not known; use {sorted(_KEYWORDS)}"
        )
    if "type" in schema and not _TYPES[schema["type"]](value):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(follows_schema(item, schema["items"]) for item in value)
    return not isinstance(value, dict) or _object_follows(value, schema)


def _object_follows(value: dict, schema: dict) -> bool:
    properties = schema.get("properties", {})
    if not all(name in value for name in schema.get("required", ())):
        return False
    if schema.get("additionalProperties") is False and value.keys() - properties.keys():
        return False
    return all(
        follows_schema(value[name], part) for name, part in properties.items() if name in value
    )


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def json_follows(answer: str, schema: str) -> bool:
    """Whether the whole answer is one JSON value (NaN and infinities are none) that is valid under
    the schema.
    """
    try:
        value = json.loads(answer, parse_constant=_no_constant)
    except ValueError:
        return False
    return follows_schema(value, json.loads(schema))


SCORERS: Mapping[str, Scorer] = {
    "exact": lambda answer, target, schema: exact_match(answer, target),
    "choice": lambda answer, target, schema: choice_letter(answer) == choice_letter(target),
    "boxed": lambda answer, target, schema: boxed(answer) == boxed(target) is not None,
    "json": lambda answer, target, schema: json_follows(answer, schema),
}
