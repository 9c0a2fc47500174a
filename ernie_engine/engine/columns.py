"""The byte codec under every frame between ranks and processes: two columns, all integers and all
floats, read in the order they were written.

Owns the header and the length checks. Knows no message, and never pickles: what comes out of a
frame are numbers.
"""

import struct
from array import array
from collections.abc import Sequence

_HEADER = struct.Struct("<4sII")  # kind, entries of each column


class ColumnWriter:
    """Append to `ints` (int64) and `floats` (fp64), then done()."""

    def __init__(self, kind: bytes):
        assert len(kind) == 4
        self.kind, self.ints, self.floats = kind, array("q"), array("d")

    def int_list(self, values: Sequence[int]) -> None:
        self.ints.append(len(values))
        self.ints.extend(values)

    def float_list(self, values: Sequence[float]) -> None:
        self.ints.append(len(values))
        self.floats.extend(values)

    def done(self) -> bytes:
        header = _HEADER.pack(self.kind, len(self.ints), len(self.floats))
        return header + self.ints.tobytes() + self.floats.tobytes()


class ColumnReader:
    """Reads what a ColumnWriter of the same kind wrote; ValueError if `data` is not that."""

    def __init__(self, kind: bytes, data: bytes):
        self.kind = kind.decode()
        if len(data) < _HEADER.size:
            raise ValueError(f"a {self.kind} frame of {len(data)} bytes has no header")
        found, num_ints, num_floats = _HEADER.unpack_from(data)
        if found != kind or len(data) != _HEADER.size + 8 * (num_ints + num_floats):
            raise ValueError(f"not a {self.kind} frame, or cut short: {len(data)} bytes")
        middle = _HEADER.size + 8 * num_ints
        self._ints = array("q", data[_HEADER.size : middle])
        self._floats = array("d", data[middle:]).tolist()
        self._int_at = self._float_at = 0

    def one(self) -> int:
        return self.take_ints(1)[0]

    def int_list(self) -> list[int]:
        return self.take_ints(self.one())

    def int_array(self) -> "array[int]":
        """An int_list(), in one piece: for long ones."""
        return self._take_ints(self.one())

    def float_list(self) -> list[float]:
        return self.take_floats(self.one())

    def take_ints(self, count: int) -> list[int]:
        return self._take_ints(count).tolist()

    def _take_ints(self, count: int) -> "array[int]":
        at, self._int_at = self._int_at, self._int_at + count
        if not at <= self._int_at <= len(self._ints):
            raise ValueError(f"a {self.kind} frame counts more entries than it has")
        return self._ints[at : self._int_at]

    def take_floats(self, count: int) -> list[float]:
        at, self._float_at = self._float_at, self._float_at + count
        if not at <= self._float_at <= len(self._floats):
            raise ValueError(f"a {self.kind} frame counts more entries than it has")
        return self._floats[at : self._float_at]

    def end(self) -> None:
        """ValueError if something was not read."""
        if (self._int_at, self._float_at) != (len(self._ints), len(self._floats)):
            raise ValueError(f"a {self.kind} frame has entries that nothing reads")
