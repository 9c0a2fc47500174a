"""The rank grid: who is who among the processes of one engine, and where a rank keeps its tensors.

Owns the arithmetic of ranks. Never talks to another rank: collectives are in comm.py, the
traffic between stages in pipe.py.
"""

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup


class Pulse:
    """Counts what a rank has begun, so that a watcher can tell slow from stuck, and who waits from
    whom it waits for."""

    def __init__(self) -> None:
        self.count = 0

    def beat(self) -> None:
        self.count += 1


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the grid (pp, tp); the 1 x 1 grid by default.

    Groups are None where the axis has one rank. The two of the pp axis join the same ranks, those
    with this tp_rank: the hidden stream going down must not wait for tokens going back.
    """

    pp_size: int = 1
    pp_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    expert_parallel: bool = False  # routed experts are dealt out whole over tp
    tp_group: ProcessGroup | None = None
    stream_group: ProcessGroup | None = None
    token_group: ProcessGroup | None = None
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_reporter(self) -> bool:
        """Whether rank 0 hears of results from this rank."""
        return self.is_last_stage and self.tp_rank == 0

    def rank_of_stage(self, pp_rank: int) -> int:
        """The rank of another stage that has this rank's share of it."""
        return pp_rank * self.tp_size + self.tp_rank

    def share(self, size: int, what: str) -> int:
        """This rank's part of `size` items dealt evenly over the tp axis."""
        if size % self.tp_size:
            raise ValueError(
                f"{what} ({size}) cannot be divided by tensor_parallel_size={self.tp_size}"
            )
        return size // self.tp_size

    def share_of_kv_heads(self, num_kv_heads: int) -> int:
        """Where there are fewer than ranks, each is copied to several."""
        if num_kv_heads % self.tp_size and self.tp_size % num_kv_heads:
            raise ValueError(
                f"{num_kv_heads} K/V heads cannot be dealt to tensor_parallel_size={self.tp_size}"
            )
        return max(1, num_kv_heads // self.tp_size)

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
