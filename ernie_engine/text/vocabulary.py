"""What a tokenizer file gives, whichever kind it is: pieces, added tokens, a plain-text encoder.

Owns the meaning of a piece in bytes and the search for added tokens. Never opens a file.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

SPACE = "▁"  # U+2581: how pieces write a space
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands; `special` if decoding may leave it out."""

    text: str
    id: int
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file, read. `encode_plain` never yields the id of a markup token."""

    ids: Mapping[str, int]  # of the pieces, as the file writes them
    added: tuple[AddedToken, ...]
    names: Mapping[str, str]  # e.g. eos_token -> </s>
    strips_leading_space: bool  # a text's first space was put there by the encoder
    encode_plain: Callable[[str], list[int]]


def is_markup(text: str) -> bool:
    """Whether a token's text may only be read as that token where the template wrote it.

    A lone character or a run of blanks (digits, say, are often declared) has no such meaning.
    """
    return len(text) > 1 and not text.isspace()


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece adds to a text: the byte of <0xNN>, else UTF-8 with ▁ as a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE, " ").encode()


def longest_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of `words` at a place; nothing matches without words.

    Words share their prefixes, so a miss costs the common length and not the number of words.
    """
    return _trie_pattern(sorted(set(words))) or r"(?!)"


def _trie_pattern(words: Sequence[str]) -> str:
    tails: dict[str, list[str]] = {}
    for word in filter(None, words):
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(head) + _trie_pattern(rest) for head, rest in tails.items()]
    if "" in words and branches:
        return f"(?:{'|'.join(branches)})?"
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
