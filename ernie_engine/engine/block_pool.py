"""The ids of KV blocks: who holds them, what finished prefix they contain, which to reuse next.

Owns reference counts, the prefix index and the eviction order. Knows no request and no tensor.
A block whose count is 0 is free; if it holds a published prefix it can still be shared until it
is handed out again, least recently freed first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DIGEST_SIZE = 16


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest published prefix: block i holds what digests[i] names."""
        hits = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def num_needed(self, hits: Sequence[int], num_new: int) -> int:
        """Free blocks that holding `hits` and `num_new` fresh ones would use up."""
        return num_new + sum(self._counts[block] == 0 for block in hits)

    def take(self, hits: Sequence[int], num_new: int) -> list[int] | None:
        """Hold `hits` once more and `num_new` fresh blocks; None, and no change, if too few."""
        if not hits and num_new == 0:  # as for most decode rows
            return []
        if self.num_needed(hits, num_new) > self.num_free:
            return None
        for block in hits:
            self._free.pop(block, None)
            self._counts[block] += 1
        return [*hits, *(self._take_oldest() for _ in range(num_new))]

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._counts[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def publish(self, block: int, digest: bytes) -> None:
        """Say that a held block contains the prefix that `digest` names; the first one is kept."""
        assert self._counts[block] > 0, f"block {block} is published but not held"
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one hold of each, a sequence's blocks in order.

        The tail is reused before the head, and blocks without a prefix before all others.
        """
        for block in reversed(block_ids):
            assert self._counts[block] > 0, f"block {block} is released twice"
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free[block] = None
                if block not in self._digest_of:
                    self._free.move_to_end(block, last=False)


class PrefixHash:
    """`digests` of a sequence's full blocks, each naming the tokens of its block and all before.

    Keyed BLAKE2b, 128 bits, over tokens as int64: nobody without `key` can make two prefixes
    collide.
    """

    def __init__(self, block_size: int, key: bytes):
        self.block_size, self.digests = block_size, list[bytes]()
        self._hash = blake2b(digest_size=DIGEST_SIZE, key=key)

    def extend(self, token_ids: "array[int]") -> None:
        """Up to the last full block of the sequence, whose beginning is what it was."""
        data = token_ids[len(self.digests) * self.block_size :].tobytes()
        size = self.block_size * token_ids.itemsize
        for start in range(0, len(data) - size + 1, size):
            self._hash.update(data[start : start + size])
            self.digests.append(self._hash.digest())
