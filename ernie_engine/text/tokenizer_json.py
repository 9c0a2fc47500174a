"""The vocabulary in a `tokenizer.json`, through the `tokenizers` package.

Owns the check that the file is a sentencepiece BPE in other clothes (byte fallback, ▁ for a
space): the bytes of a token could not be told otherwise. Never adds bos or eos.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from ernie_engine.text.special_tokens import DeclaredTokens
from ernie_engine.text.vocabulary import SPACE, Vocabulary, is_markup

_DECODER = [  # what the decoders of a sentencepiece tokenizer do, in this order
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def read_tokenizer_json(
    path: Path, data: Mapping[str, Any], declared: DeclaredTokens
) -> Vocabulary:
    """The vocabulary in `data`, the content of `path`; ValueError if it is of another kind."""
    try:
        _check(data)
        ids = {str(text): int(token_id) for text, token_id in data["model"]["vocab"].items()}
        encoder = Encoder.from_str(json.dumps(_without_markup(data)))
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{path}: not a usable tokenizer: {error}") from error
    added = declared.added_tokens(ids)
    return Vocabulary(
        ids=ids,
        added=added,
        names=declared.names,
        strips_leading_space=False,
        encode_plain=lambda text: encoder.encode(text, add_special_tokens=False).ids,
    )


def _check(data: Mapping[str, Any]) -> None:
    model, decoder = data["model"], data.get("decoder") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") is not True:
        raise ValueError("only BPE with byte fallback is supported")
    if decoder.get("type") != "Sequence" or decoder.get("decoders") != _DECODER:
        raise ValueError(
            "its decoder is not the one of a sentencepiece tokenizer without dummy prefix "
            f"(Replace {SPACE}, ByteFallback, Fuse), so the bytes of its tokens are unknown"
        )


def _without_markup(data: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer that reads text as text: without the added tokens that are markup."""
    added = [token for token in data["added_tokens"] if not is_markup(token["content"])]
    return {**data, "added_tokens": added, "truncation": None, "padding": None}
