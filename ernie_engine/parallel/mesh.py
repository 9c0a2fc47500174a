"""The rank grid: who is who among the processes of one engine, and where a rank keeps its tensors.

Owns the arithmetic of ranks. Never talks to another rank: collectives are in comm.py.
"""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the grid (pp, tp); the 1 x 1 grid by default."""

    pp_size: int = 1
    pp_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    tp_group: ProcessGroup | None = None

    def share(self, size: int, what: str) -> int:
        """This rank's part of `size` items dealt evenly over the tp axis."""
        if size % self.tp_size:
            raise ValueError(
                f"{what} ({size}) cannot be divided by tensor_parallel_size={self.tp_size}"
            )
        return size // self.tp_size

    def cut(self, size: int, what: str) -> slice:
        """The slice of `size` items that this rank holds."""
        share = self.share(size, what)
        return slice(self.tp_rank * share, (self.tp_rank + 1) * share)


@dataclass(frozen=True)
class Placement:
    """Where and as what a layer allocates its weights."""

    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
