"""What --help says of the flags that configs make."""

import argparse
from dataclasses import fields

import pytest

from ernie_engine.cli import add_arguments
from ernie_engine.engine_config import EngineConfig
from ernie_engine.server.settings import ServerConfig


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_every_option_is_explained(monkeypatch, config):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken
    parser = argparse.ArgumentParser(prog="x")
    add_arguments(parser, config, "options")
    said = parser.format_help()
    for field in fields(config):
        text = field.metadata.get("help")
        assert text, f"{field.name}: {config.__name__} does not say what it is"
        assert text in said
