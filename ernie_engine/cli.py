"""Configurations as command-line flags and YAML files, the same for every script.

Owns the flags' names (the fields', with dashes) and their help. Never runs anything.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ernie_engine.engine_config import EngineConfig


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of EngineConfig."""
    add_arguments(parser, EngineConfig, "engine")


def engine_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords for Engine() from parsed flags."""
    return chosen_fields(args, EngineConfig)


def add_arguments(parser: argparse.ArgumentParser, config: type, title: str) -> None:
    """A flag for each field of a dataclass: --x and --no-x where it is a bool, several values
    where it is a tuple. A field's metadata may hold a "help" text."""
    group = parser.add_argument_group(title)
    for field in fields(config):
        flag, required = "--" + field.name.replace("_", "-"), field.default is MISSING
        text = "required" if required else f"default: {field.default}"
        text = "; ".join([*filter(None, [field.metadata.get("help")]), text])
        default = None if required else field.default
        if field.type is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=default, help=text)
            continue
        kind = next(iter(get_args(field.type)), field.type)  # int of `int | None`
        assert isinstance(kind, type)
        several = {"nargs": "+"} if get_origin(field.type) is tuple else {}
        group.add_argument(
            flag, type=kind, required=required, default=default, help=text, **several
        )


def chosen_fields(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The keywords for a dataclass from parsed flags."""
    chosen = {field.name: getattr(args, field.name) for field in fields(config)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}


def arguments_of_file(path: Path, configs: Sequence[type]) -> list[str]:
    """A YAML file of field names as flags, to be put before those of the command line.

    ValueError names what is not a field, or not a value that a flag could have.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(path)!r}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config={str(path)!r}: expected lines of the form `name: value`")
    known = {field.name: field.type for config in configs for field in fields(config)}
    arguments = []
    for name, value in data.items():
        if name not in known:
            raise ValueError(f"config={str(path)!r}: {name!r} is not an option; see --help")
        arguments += _as_arguments(name, value, known[name])
    return arguments


def _as_arguments(name: str, value: Any, kind: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    values = value if isinstance(value, list) and get_origin(kind) is tuple else [value]
    if value is None:
        return []
    if kind is bool and isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if kind is bool or not all(type(one) in (str, int, float) for one in values):
        raise ValueError(f"{name}={value!r}: not a value for this option; see --help")
    return [flag, *map(str, values)] if len(values) > 1 else [f"{flag}={values[0]}"]
