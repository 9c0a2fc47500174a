"""EngineConfig as command-line flags, the same for every script.

Owns the flags' names (the fields', with dashes) and their help. Never runs anything.
"""

import argparse
from dataclasses import MISSING, fields
from typing import Any, get_args

from ernie_engine.engine_config import EngineConfig


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of EngineConfig; --enable-x and --no-enable-x where it is a bool."""
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        flag, required = "--" + field.name.replace("_", "-"), field.default is MISSING
        text = "required" if required else f"default: {field.default}"
        if field.type is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=field.default, help=text)
        else:
            kind = next(iter(get_args(field.type)), field.type)  # int of `int | None`
            default = None if required else field.default
            assert isinstance(kind, type)
            group.add_argument(flag, type=kind, required=required, default=default, help=text)


def engine_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords for Engine() from parsed flags."""
    return {field.name: getattr(args, field.name) for field in fields(EngineConfig)}
