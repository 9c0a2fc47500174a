"""Text to token ids and back, by the tokenizer file of a checkpoint.

Owns the cutting of text at special and added tokens. Never adds a bos or an eos token, and never
runs code from a checkpoint.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ernie_engine.text.detokenizer import IncrementalDetokenizer
from ernie_engine.text.files import read_json
from ernie_engine.text.sentencepiece_model import read_sentencepiece
from ernie_engine.text.special_tokens import read_declared_tokens
from ernie_engine.text.tokenizer_json import read_tokenizer_json
from ernie_engine.text.vocabulary import Vocabulary, is_markup, longest_of, piece_bytes


def load_tokenizer(folder: Path) -> "Tokenizer | None":
    """The tokenizer in `folder`: tokenizer.model, else tokenizer.json, else None.

    ValueError, naming the file, if what is there is corrupt or of a kind that is not supported.
    """
    model_path, json_path = folder / "tokenizer.model", folder / "tokenizer.json"
    tokenizer_json = read_json(json_path)
    if model_path.is_file():
        declared = read_declared_tokens(folder, tokenizer_json)
        return Tokenizer(read_sentencepiece(model_path, declared))
    if tokenizer_json is not None:
        declared = read_declared_tokens(folder, tokenizer_json)
        return Tokenizer(read_tokenizer_json(json_path, tokenizer_json, declared))
    return None


class Tokenizer:
    """Immutable, so it may be used by several threads at once."""

    def __init__(self, vocabulary: Vocabulary):
        added = {token.id: token for token in vocabulary.added}
        self.vocab_size = 1 + max([*vocabulary.ids.values(), *added], default=-1)
        self.names = vocabulary.names  # role -> text of a special token, for templates
        self.strips_leading_space = vocabulary.strips_leading_space
        self._ids = {**vocabulary.ids, **{token.text: token.id for token in added.values()}}
        self._bytes = {i: piece_bytes(piece) for piece, i in vocabulary.ids.items()}
        self._bytes |= {token.id: token.text.encode() for token in added.values()}
        self.longest_token = max(len(text) for text in self._bytes.values())  # bytes
        self._special_ids = {token.id for token in added.values() if token.special}
        self._encode_plain = vocabulary.encode_plain
        texts = [token.text for token in added.values()]
        self._added_ids = {token.text: token.id for token in added.values()}
        self._added = re.compile(longest_of(texts))
        # looks ahead only, so that overlapping tokens are all found
        self._markup = re.compile(f"(?=({longest_of(filter(is_markup, texts))}))(.)", re.DOTALL)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The ids of `text`; nothing is added to it.

        With parse_special=False the text of a special or added token is text like any other.
        ValueError if `text` holds a lone surrogate.
        """
        if not parse_special:
            return self._encode_plain(_checked(text))
        ids: list[int] = []
        for part in self.split(_checked(text)):
            ids.extend([part] if isinstance(part, int) else self._encode_plain(part))
        return ids

    def split(self, text: str) -> Iterator[str | int]:
        """`text` in order: the ids of added tokens, and the plain text between them."""
        start = 0
        for match in self._added.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield self._added_ids[match[0]]
            start = match.end()
        if start < len(text):
            yield text[start:]

    def shield(self, text: str, mark: str, keep: Collection[str] = ()) -> str:
        """`text` with `mark` set inside each special or added token, but those in `keep`.

        `split` then finds none of them; taking `mark` out again restores the text.
        """
        return self._markup.sub(lambda m: m[2] if m[1] in keep else m[2] + mark, text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Unknown ids add nothing."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; b"" for an id without a token (a padded vocabulary)."""
        return self._bytes.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """A token alone, for display; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, or of a piece as the vocabulary writes it."""
        return self._ids.get(token)

    @property
    def bos_token(self) -> str | None:
        return self.names.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.names.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.names.get("pad_token")

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds a lone surrogate at character {error.start}") from error
    return text
