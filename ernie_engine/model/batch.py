"""ForwardBatch: the device tensors of one step, built from a plan and the slots.

Positions, input ids and cache slots are computed on the device from per-slot state, so that a
token drawn by the step before need not come to the CPU first. Owns no state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_engine.engine.plan import StepPlan
from ernie_engine.model.slots import Slots, to_device


class AttentionRows(NamedTuple):
    """Rows for one attention call: see kernels/attention.py for the shapes."""

    block_tables: Tensor  # [R, M] int32
    query_start: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32
    max_query_len: int


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R rows, rows of one query token first.

    slots [R]; input_ids, positions, cache_slots [T] int64; the first `num_decode_tokens` tokens
    belong to `decode`, the others to `prefill` (None where there are none).
    """

    slots: Tensor
    row_ends: Tensor  # [R] int64: the row's last token in the batch
    row_starts: Tensor  # [R] int64: its first
    input_ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    num_decode_tokens: int
    decode: AttentionRows | None
    prefill: AttentionRows | None


def build_batch(plan: StepPlan, state: Slots) -> ForwardBatch:
    """The step's batch; state must hold the plan's deltas already. Advances the lengths."""
    num_rows, total = len(plan.slots), sum(plan.num_tokens)
    columns = [list(plan.slots), list(plan.num_tokens)]
    slots, counts = to_device(columns, torch.int64, state.device)
    ends = counts.cumsum(0)
    starts = ends - counts

    row = torch.arange(num_rows, device=state.device)
    row = row.repeat_interleave(counts, output_size=total)  # [T]: the token's row
    offset = torch.arange(total, device=state.device) - starts[row]
    slot = slots[row]
    positions = state.num_computed[slot] + offset
    state.advance(slots, counts)

    num_decodes = sum(n == 1 for n in plan.num_tokens)
    most_blocks = max(state.num_blocks[slot] for slot in plan.slots)
    tables = state.block_tables[slots, :most_blocks]
    context_lens = state.num_computed[slots].int()
    block = state.block_tables[slot, positions // state.block_size].long()

    def rows(first: int, last: int, lens: Sequence[int]) -> AttentionRows | None:
        if first == last:
            return None
        bounds = torch.cat([starts[first : first + 1], ends[first:last]]) - starts[first]
        return AttentionRows(tables[first:last], bounds.int(), context_lens[first:last], max(lens))

    return ForwardBatch(
        slots=slots,
        row_ends=ends - 1,
        row_starts=starts,
        input_ids=state.history[slot, positions].long(),
        positions=positions,
        cache_slots=block * state.block_size + positions % state.block_size,
        num_decode_tokens=num_decodes,
        decode=rows(0, num_decodes, (1,)),
        prefill=rows(num_decodes, num_rows, plan.num_tokens[num_decodes:]),
    )
