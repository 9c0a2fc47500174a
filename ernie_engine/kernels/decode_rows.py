"""What a step of decoding rows is made from, out of per-slot state: where each row stands, what it
reads and where it writes.

    position = num_computed[slot];  input = history[slot, position];  context = position + 1
    cache slot = block_tables[slot, position // B] * B + position % B

and num_computed[slot] becomes the context, but for the spare slot, to which padding rows belong: it
has computed nothing, always. In torch these are some eighteen launches of a few numbers each.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import overlap, wait_for_inputs

BLOCK = 1024  # entries of a block table copied together


class DecodeRows(NamedTuple):
    """R rows of one query token each."""

    input_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    cache_slots: Tensor  # [R] int64
    context_lens: Tensor  # [R] int32
    block_tables: Tensor  # [R, width] int32; of what is behind a row's context nothing is said


@triton.jit(do_not_specialize=["slots", "spare", "history_stride", "table_stride", "width"])
def _decode_rows_kernel(
    slots,
    num_computed,
    history,
    block_tables,
    input_ids,
    positions,
    cache_slots,
    context_lens,
    tables,
    spare,
    history_stride,
    table_stride,
    width,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has a row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    position = tl.load(num_computed + slot)
    table = block_tables + slot * table_stride
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.debug_barrier()  # every thread has the position before one of them advances it
    tl.store(num_computed + slot, tl.where(slot == spare, 0, position + 1))
    token = tl.load(history + slot * history_stride + position)
    tl.store(input_ids + row, token.to(tl.int64))
    tl.store(positions + row, position)
    tl.store(cache_slots + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(context_lens + row, (position + 1).to(tl.int32))
    num_blocks = tl.minimum(position // BLOCK_SIZE + 1, width)
    for start in tl.range(0, num_blocks, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mine = entry < num_blocks
        tl.store(tables + row * width + entry, tl.load(table + entry, mask=mine), mask=mine)


def decode_rows_triton(
    slots: Tensor,
    num_computed: Tensor,
    history: Tensor,
    block_tables: Tensor,
    block_size: int,
    width: int,
    spare: int,
) -> DecodeRows:
    """As the twin, all tensors contiguous; what is behind a row's context stays unwritten."""
    num_rows = len(slots)
    assert all(t.is_contiguous() for t in (slots, num_computed, history, block_tables))
    input_ids, positions, cache_slots = (torch.empty_like(slots) for _ in range(3))
    context_lens = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    tables = torch.empty(num_rows, width, dtype=torch.int32, device=slots.device)
    rows = DecodeRows(input_ids, positions, cache_slots, context_lens, tables)
    if num_rows:
        _decode_rows_kernel[(num_rows,)](
            *(slots, num_computed, history, block_tables, *rows, spare),
            *(history.stride(0), block_tables.stride(0), width),
            BLOCK_SIZE=block_size,
            BLOCK=BLOCK,
            **overlap(slots.device),
        )
    return rows


def decode_rows_torch(
    slots: Tensor,
    num_computed: Tensor,
    history: Tensor,
    block_tables: Tensor,
    block_size: int,
    width: int,
    spare: int,
) -> DecodeRows:
    """slots [R] int64, all different but for the spare one, num_computed [S] int64, history [S, L]
    int32, block_tables [S, M] int32 -> DecodeRows, tables [R, width] with width <= M; num_computed
    is advanced. Never waits for the device."""
    positions = num_computed[slots]
    block = block_tables[slots, positions // block_size].long()
    num_computed[slots] = positions + 1
    num_computed[spare : spare + 1].zero_()
    return DecodeRows(
        input_ids=history[slots, positions].long(),
        positions=positions,
        cache_slots=block * block_size + positions % block_size,
        context_lens=(positions + 1).int(),
        block_tables=block_tables[slots, :width],
    )


IMPLEMENTATIONS = {"decode_rows": {"triton": decode_rows_triton, "torch": decode_rows_torch}}
