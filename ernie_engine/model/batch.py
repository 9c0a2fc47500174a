"""ForwardBatch: the device tensors of one step, built from its rows and the slots.

Positions, input ids and cache slots are computed on the device from per-slot state, so that a
token drawn by the step before need not come to the CPU first. What the host must know is a
StepShape; all else is a function of two small tensors, so that a graph can hold it. Owns no state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_engine.engine.plan import StepPlan
from ernie_engine.kernels.registry import Ops
from ernie_engine.model.slots import Slots


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step, equal on all ranks.

    `num_rows` rows have `num_tokens` query tokens. The first `num_decodes` have one each and an
    attention kernel of their own; no other has more than `longest`. No context takes more than
    `most_blocks` blocks.
    """

    num_rows: int
    num_tokens: int
    num_decodes: int
    longest: int
    most_blocks: int


def shape_of(plan: StepPlan, num_blocks: Mapping[int, int]) -> StepShape:
    """The plan's own shape; num_blocks: slot -> blocks, the plan's among them."""
    return StepShape(
        num_rows=len(plan.slots),
        num_tokens=sum(plan.num_tokens),
        num_decodes=sum(n == 1 for n in plan.num_tokens),
        longest=max(plan.num_tokens),
        most_blocks=max(num_blocks[slot] for slot in plan.slots),
    )


class AttentionRows(NamedTuple):
    """Rows for one attention call: see kernels/prefill_attention.py for the shapes."""

    block_tables: Tensor  # [R, M] int32
    query_start: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32
    max_query_len: int


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R rows.

    slots [R]; input_ids, positions, cache_slots [T] int64; the first `num_decode_tokens` tokens
    belong to `decode`, the others to `prefill` (None where there are none).
    """

    slots: Tensor
    row_ends: Tensor  # [R] int64 or int32: the row's last token in the batch
    input_ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    next_positions: Tensor  # [R] int64: where the row's next token belongs
    num_decode_tokens: int
    decode: AttentionRows | None
    prefill: AttentionRows | None


def build_batch(
    slots: Tensor, counts: Tensor, shape: StepShape, state: Slots, ops: Ops
) -> ForwardBatch:
    """The batch of rows with `counts` query tokens of `slots`, both [R] int64; state must hold the
    plan's deltas already. Advances the lengths. Never waits for the device."""
    if shape.num_decodes == shape.num_rows:
        return _decode_batch(slots, shape, state, ops)
    return _mixed_batch(slots, counts, shape, state)


def _decode_batch(slots: Tensor, shape: StepShape, state: Slots, ops: Ops) -> ForwardBatch:
    """Of rows with a token each."""
    bounds = state.counting[: shape.num_rows + 1]
    rows = ops.decode_rows(
        *(slots, state.num_computed, state.history, state.block_tables),
        *(state.block_size, shape.most_blocks, state.spare),
    )
    return ForwardBatch(
        slots=slots,
        row_ends=bounds[:-1],
        input_ids=rows.input_ids,
        positions=rows.positions,
        cache_slots=rows.cache_slots,
        next_positions=rows.context_lens.long(),
        num_decode_tokens=shape.num_rows,
        decode=AttentionRows(rows.block_tables, bounds, rows.context_lens, 1),
        prefill=None,
    )


def _mixed_batch(slots: Tensor, counts: Tensor, shape: StepShape, state: Slots) -> ForwardBatch:
    num_decodes, device = shape.num_decodes, state.device
    computed = state.num_computed[slots]
    context_lens = computed + counts
    state.advance_to(slots, context_lens)
    place = torch.arange(shape.num_tokens, device=device)
    ends = counts.cumsum(0)
    starts = ends - counts
    row = torch.arange(shape.num_rows, device=device)
    row = row.repeat_interleave(counts, output_size=shape.num_tokens)  # [T]: the token's row
    slot, positions = slots[row], (computed - starts)[row] + place
    tables = state.block_tables[slots, : shape.most_blocks]
    block = state.block_tables[slot, positions // state.block_size].long()

    def rows(first: int, last: int, longest: int) -> AttentionRows | None:
        if first == last:
            return None
        bounds = torch.cat([starts[first : first + 1], ends[first:last]]) - starts[first]
        lens = context_lens[first:last].int()
        return AttentionRows(tables[first:last], bounds.int(), lens, longest)

    return ForwardBatch(
        slots=slots,
        row_ends=ends - 1,
        input_ids=state.history[slot, positions].long(),
        positions=positions,
        cache_slots=block * state.block_size + positions % state.block_size,
        next_positions=context_lens,
        num_decode_tokens=num_decodes,
        decode=rows(0, num_decodes, 1),
        prefill=rows(num_decodes, shape.num_rows, shape.longest),
    )
