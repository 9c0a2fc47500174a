"""A field of a config that --help explains: its meaning is said once, where it is declared.

Owns nothing else; flags are made of such fields by cli.py.
"""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """default: MISSING for a field that must be given."""
    return field(default=default, metadata={"help": text})
