"""The special and added tokens that a checkpoint declares beside its vocabulary.

Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and the added tokens of
tokenizer.json. Never invents an id: a token that is named and has none is an error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie_engine.text.files import read_json
from ernie_engine.text.vocabulary import SPACE, AddedToken, is_markup

_MAX_TOKEN_CHARS = 256
_MAX_ID = 2**31 - 1
_UNSUPPORTED_FLAGS = ("lstrip", "rstrip", "single_word")
_UNNAMED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class DeclaredTokens:
    names: Mapping[str, str]  # role -> text: {"eos_token": "</s>", ...}
    ids: Mapping[str, int]  # text -> id, of the tokens that are declared with one
    flagged: frozenset[str]  # special, by flag or as an additional special token

    @cached_property
    def special(self) -> frozenset[str]:
        """The texts that decoding may leave out."""
        return self.flagged | frozenset(self.names.values())

    def with_defaults(self, names: Mapping[str, str]) -> "DeclaredTokens":
        """The same, with `names` for the roles that no file names."""
        return replace(self, names={**names, **self.names})

    def added_tokens(
        self, pieces: Mapping[str, int], own: Mapping[str, bool] | None = None
    ) -> tuple[AddedToken, ...]:
        """All tokens to cut out of text: the declared ones and the vocabulary's `own` (text ->
        special or not).

        Ordinary text (see is_markup) that is a piece already is left to the vocabulary.
        """
        special = self.special | {text for text, flag in (own or {}).items() if flag}
        texts = dict.fromkeys([*(own or ()), *self.ids, *sorted(special)])
        ids = {text: self._id_of(text, pieces) for text in texts}
        if len(set(ids.values())) < len(ids):
            raise ValueError("two added tokens have the same id: see added_tokens.json")
        return tuple(
            AddedToken(text, token_id, text in special)
            for text, token_id in ids.items()
            if is_markup(text) or _piece_id(text, pieces) is None
        )

    def _id_of(self, text: str, pieces: Mapping[str, int]) -> int:
        piece_id = _piece_id(text, pieces)
        token_id = self.ids.get(text, piece_id)
        if token_id is None:
            raise ValueError(
                f"special token {text!r} has no id: it is neither in the vocabulary nor in "
                "added_tokens.json"
            )
        if token_id != piece_id and (piece_id is not None or token_id < len(pieces)):
            raise ValueError(f"added token {text!r}: id {token_id} contradicts the vocabulary")
        return token_id


def _piece_id(text: str, pieces: Mapping[str, int]) -> int | None:
    return pieces.get(text, pieces.get(text.replace(" ", SPACE)))


def read_declared_tokens(folder: Path, tokenizer_json: Mapping[str, Any] | None) -> DeclaredTokens:
    """What the files of `folder` declare; `tokenizer_json` is the content of that file."""
    config_path = folder / "tokenizer_config.json"
    map_path = folder / "special_tokens_map.json"
    config, mapped = read_json(config_path) or {}, read_json(map_path) or {}
    ids, flagged = dict(_ids_of_added_tokens_json(folder / "added_tokens.json")), set[str]()
    for where, entry, token_id in _entries(folder, config, tokenizer_json):
        text = _text(entry, where)
        if ids.setdefault(text, token_id) != token_id:
            raise ValueError(f"{where}: {text!r} has id {token_id} here and {ids[text]} elsewhere")
        if entry.get("special"):
            flagged.add(text)
    flagged |= {*_unnamed(config, config_path), *_unnamed(mapped, map_path)}
    names = {**_names(mapped, map_path), **_names(config, config_path)}
    return DeclaredTokens(names, ids, frozenset(flagged))


def _ids_of_added_tokens_json(path: Path) -> Iterator[tuple[str, int]]:
    for text, token_id in (read_json(path) or {}).items():
        yield _text(text, str(path)), _id(token_id, f"{path}: {text!r}")


def _entries(
    folder: Path, config: Mapping[str, Any], tokenizer_json: Mapping[str, Any] | None
) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    decoder = config.get("added_tokens_decoder") or {}
    for key, entry in _checked(decoder, dict, where).items():
        yield where, _checked(entry, dict, where), _id(key, where)
    where = f"{folder / 'tokenizer.json'}: added_tokens"
    listed = (tokenizer_json or {}).get("added_tokens") or []
    for entry in _checked(listed, list, where):
        yield where, _checked(entry, dict, where), _id(entry.get("id"), where)


def _names(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The roles of a file: its keys `..._token` (but add_bos_token and the like are switches)."""
    roles = {
        key: value
        for key, value in data.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    return {role: _text(value, f"{path}: {role}") for role, value in roles.items()}


def _unnamed(data: Mapping[str, Any], path: Path) -> Iterator[str]:
    for key in _UNNAMED:
        tokens = data.get(key) or []
        tokens = tokens.values() if isinstance(tokens, dict) else _checked(tokens, list, str(path))
        yield from (_text(token, f"{path}: {key}") for token in tokens)


def _text(token: object, where: str) -> str:
    """The text of a token, written as a string or as an object with `content`."""
    if isinstance(token, dict):
        for flag in _UNSUPPORTED_FLAGS:
            if token.get(flag):
                raise ValueError(f"{where}: {token.get('content')!r}: {flag} is not supported")
        token = token.get("content")
    if not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN_CHARS:
        raise ValueError(
            f"{where}: expected a token text of 1 to {_MAX_TOKEN_CHARS} characters, found {token!r}"
        )
    return token


def _id(value: object, where: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_ID:
        raise ValueError(f"{where}: expected a token id, found {value!r}")
    return value


def _checked(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a {kind.__name__}, found {value!r:.80}")
    return value
