"""Jinja as chat templates know it: sandboxed, bounded, with the functions transformers gives them.

Knows nothing of messages or tokens. Whatever goes wrong in a template is a ValueError.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 16 * 1024 * 1024

Render = Callable[[Mapping[str, Any]], str]


def compile_template(source: str) -> Render:
    """A function from the template's variables to its text. ValueError on a syntax error."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error}") from error

    def render(variables: Mapping[str, Any]) -> str:
        try:
            return _bounded_render(template, variables)
        except Exception as error:  # a template can raise anything
            raise ValueError(f"chat template: {error}") from error

    return render


def _bounded_render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise ValueError(f"the prompt is longer than {MAX_RENDERED_CHARS} characters")
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape <, >, & and '."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
