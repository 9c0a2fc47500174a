"""The part of a step that a graph can hold: rows -> batch -> this stage's layers, and of a few
single tokens the logits.

Owns what one such pass needs. Never sees a plan, another stage or a sampler; eager steps and
recorded ones run the same code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_engine.model.batch import StepShape, build_batch
from ernie_engine.model.ernie import Ernie
from ernie_engine.model.kv_cache import KVCache
from ernie_engine.model.slots import Slots

# All rows of a step of single tokens are drawn from, and what the host launches for that is what
# a small step waits for: so their logits are part of the graph. Each graph keeps its own.
MOST_LOGITS = 64


class StepRows(NamedTuple):
    """Where a step's rows and tokens are found afterwards."""

    slots: Tensor  # [R] int64
    row_ends: Tensor  # [R] int64 or int32: the row's last token in the batch
    positions: Tensor  # [T] int64
    next_positions: Tensor  # [R] int64: where the row's next token belongs


class StepOutput(NamedTuple):
    rows: StepRows
    hidden: Tensor  # [T, H]
    logits: Tensor | None  # [T, V] fp32, of a step of at most MOST_LOGITS rows of a token each


@dataclass(frozen=True)
class Forward:
    """`model` over the requests in `state` and the blocks of `kv`."""

    model: Ernie
    state: Slots
    kv: KVCache

    def __post_init__(self) -> None:
        self.state.park_spare(self.kv.scratch_block)

    @torch.inference_mode()
    def __call__(
        self, slots: Tensor, counts: Tensor, shape: StepShape, stream: Tensor | None
    ) -> StepOutput:
        """slots, counts [R] int64 and what the stage before gave [T, H]."""
        batch = build_batch(slots, counts, shape, self.state, self.model.ops)
        hidden = self.model(batch, self.kv, stream)
        rows = StepRows(batch.slots, batch.row_ends, batch.positions, batch.next_positions)
        with_logits = self.model.is_last and shape.num_decodes == shape.num_rows <= MOST_LOGITS
        return StepOutput(rows, hidden, self.model.logits(hidden) if with_logits else None)
