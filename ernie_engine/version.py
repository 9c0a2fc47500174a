"""The version, as in pyproject.toml. Here, so that every room can tell it."""

VERSION = "0.1.0"
