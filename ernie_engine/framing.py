"""How a frame travels between two processes of the engine: its length, then its payload.

Owns the length check, on both ends. Knows no meaning: a payload's first four bytes are its kind.
"""

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


def framed(payload: bytes) -> bytes:
    """The payload as it travels."""
    return _LENGTH.pack(_checked(len(payload), MAX_FRAME_BYTES)) + payload


def read_frame(file: BinaryIO, most: int = MAX_FRAME_BYTES) -> bytes | None:
    """The next payload; None where the stream ends, also within a frame. ValueError above `most`
    bytes, before any of them is read."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    length = _checked(_LENGTH.unpack(head)[0], most)
    payload = file.read(length)
    return payload if len(payload) == length else None


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """As read_frame."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_checked(_LENGTH.unpack(head)[0], MAX_FRAME_BYTES))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked(length: int, most: int) -> int:
    if not 4 <= length <= most:
        raise ValueError(f"a frame of {length} bytes; at most {most} may be sent")
    return length


def kind_of(payload: bytes) -> bytes:
    return payload[:4]


def encode_json(kind: bytes, data: Mapping[str, Any]) -> bytes:
    """For what is said once."""
    return kind + json.dumps(data).encode()


def decode_json(payload: bytes) -> dict[str, Any]:
    """ValueError if it is no JSON object."""
    try:
        data = json.loads(payload[4:])
    except RecursionError as error:
        raise ValueError("a frame of JSON is nested too deep") from error
    if not isinstance(data, dict):
        raise ValueError("a frame of JSON holds no object")
    return data
