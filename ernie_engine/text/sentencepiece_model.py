"""The vocabulary in a sentencepiece `tokenizer.model`.

Owns the little of the protobuf format that sentencepiece's own API does not show: the type of a
piece. The encoder is sentencepiece itself. Format: sentencepiece_model.proto (ModelProto) and
https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ernie_engine.text.special_tokens import DeclaredTokens
from ernie_engine.text.vocabulary import SPACE, Vocabulary, is_markup

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_PIECES, _PIECE_TEXT, _PIECE_TYPE = 1, 1, 3  # fields of ModelProto and of its SentencePiece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type
_TYPE_CONTROL = bytes([_PIECE_TYPE << 3 | _VARINT, _CONTROL])  # the field, encoded


def read_sentencepiece(path: Path, declared: DeclaredTokens) -> Vocabulary:
    """The vocabulary in `path` with the added tokens of `declared`; ValueError if it is corrupt."""
    model = path.read_bytes()
    try:
        pieces = list(_pieces(model))
        processor = SentencePieceProcessor(model_proto=model)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
    if not pieces:
        raise ValueError(f"{path}: not a sentencepiece model: it holds no pieces")
    ids = {text: token_id for token_id, (text, _) in enumerate(pieces)}
    declared = declared.with_defaults(_named_by(processor))
    own = {text: kind == _CONTROL for text, kind in pieces if _is_added(text, kind)}
    added = declared.added_tokens(ids, own)
    unknown = {token_id for token_id, (_, kind) in enumerate(pieces) if kind == _UNKNOWN}
    markup = {token.id for token in added if is_markup(token.text)} - unknown  # not in any text
    plain = SentencePieceProcessor(model_proto=_unreachable(model, markup))
    return Vocabulary(
        ids=ids,
        added=added,
        names=declared.names,
        strips_leading_space=processor.normalize("x").startswith(SPACE),  # add_dummy_prefix
        encode_plain=plain.encode,
    )


def _named_by(processor: SentencePieceProcessor) -> dict[str, str]:
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    return {
        name: processor.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0
    }


def _is_added(text: str, kind: int) -> bool:
    """Whether a piece counts as an added token, though no file declares it (as in transformers)."""
    return kind == _CONTROL or (kind == _USER_DEFINED and is_markup(text) and SPACE not in text)


def _unreachable(model: bytes, ids: Collection[int]) -> bytes:
    """The model with the pieces `ids` made control symbols, which no text is ever encoded to.

    sentencepiece finds a user-defined piece in any text, a user's as well as a template's.
    """
    result, token_id = bytearray(), 0
    for number, wire_type, value, raw in _fields(model):
        if (number, wire_type) == (_PIECES, _BYTES):
            if token_id in ids:
                changed = value + _TYPE_CONTROL  # of a repeated scalar field the last one counts
                raw = raw[:1] + _varint(len(changed)) + changed
            token_id += 1
        result += raw
    return bytes(result)


def _pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """(text, type) of each piece, by id."""
    for number, wire_type, value, _ in _fields(model):
        if (number, wire_type) != (_PIECES, _BYTES):
            continue
        text, kind = "", _NORMAL
        for inner, inner_type, inner_value, _ in _fields(value):
            if (inner, inner_type) == (_PIECE_TEXT, _BYTES):
                text = inner_value.decode()
            elif (inner, inner_type) == (_PIECE_TYPE, _VARINT):
                kind = inner_value[0]
        yield text, kind


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(field number, wire type, value, all bytes of the field) in the order of the message."""
    start = 0
    while start < len(message):
        tag, begin = _read_varint(message, start)
        wire_type, end = tag & 7, begin
        if wire_type == _VARINT:
            _, end = _read_varint(message, begin)
        elif wire_type == _BYTES:
            length, begin = _read_varint(message, begin)
            end = begin + length
        elif wire_type in (_FIXED32, _FIXED64):
            end = begin + (4 if wire_type == _FIXED32 else 8)
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {start}")
        if end > len(message):
            raise ValueError(f"truncated at byte {len(message)}")
        yield tag >> 3, wire_type, message[begin:end], message[start:end]
        start = end


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """The number at `start` and the place after it."""
    value = 0
    for end in range(start, min(start + 10, len(message))):
        value |= (message[end] & 0x7F) << 7 * (end - start)
        if message[end] < 0x80:
            return value, end + 1
    raise ValueError(f"truncated number at byte {start}")


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])
