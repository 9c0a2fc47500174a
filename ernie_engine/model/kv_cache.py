"""The paged K/V tensors of a rank's layers and the arithmetic of their bytes.

Never decides who holds a block (block_pool.py) and never moves one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVGeometry:
    """The shape of one rank's cache: its layers, its K/V heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_in(self, num_bytes: int) -> int:
        return num_bytes // self.bytes_per_block


class KVCache:
    """K and V of `num_blocks` blocks for every layer, [num_blocks + 1, block_size, Hkv, D] each.

    The last, `scratch_block`, is never anybody's: padding rows write there. Zeroed: a padded read
    of a slot that nothing has written yet must be finite.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int, device: torch.device):
        self.geometry, self.num_blocks = geometry, num_blocks
        self.scratch_block = num_blocks
        g = geometry
        shape = (g.num_layers, 2, num_blocks + 1, g.block_size, g.num_kv_heads, g.head_dim)
        self._data = torch.zeros(shape, dtype=g.dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The K and V caches of the rank's `index`-th layer."""
        k, v = self._data[index]
        return k, v

    def fill(self, block_ids: Sequence[int], value: float) -> None:
        """Put one number everywhere in these blocks, in all layers."""
        self._data.index_fill_(2, torch.tensor(block_ids, device=self._data.device), value)

    def copy_of(self, block_ids: Sequence[int]) -> Tensor:
        """What these blocks hold [layers, 2, len(block_ids), block_size, Hkv, D]."""
        return self._data.index_select(2, torch.tensor(block_ids, device=self._data.device))
