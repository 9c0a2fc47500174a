"""Entries (a token's choices of experts) in the order of their experts, and tiles of them.

Owns the order and the bounds of tiles, both made on the device: programs place blocks of entries
behind all that counts say comes before. Few entries each program counts for itself; for many a
launch before counts the blocks. Stable, no order depends on a race, and nothing is counted on the
host. Never sees a weight.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs

# By entries. BLOCK: those of a program, of which it looks at ROUND together. AT_ONCE: as many as
# there may be, where each program counts them all; 0: they were counted by a launch before.
SORT_TABLE = {
    (DEFAULT, 64): {"BLOCK": 64, "ROUND": 64, "AT_ONCE": 64, "num_warps": 4},
    (DEFAULT, 512): {"BLOCK": 32, "ROUND": 32, "AT_ONCE": 512, "num_warps": 4},
    (DEFAULT, 2048): {"BLOCK": 32, "ROUND": 32, "AT_ONCE": 2048, "num_warps": 4},
    (DEFAULT, 16384): {"BLOCK": 128, "ROUND": 128, "AT_ONCE": 0, "num_warps": 4},
    (DEFAULT, 65536): {"BLOCK": 256, "ROUND": 128, "AT_ONCE": 0, "num_warps": 4},
    (DEFAULT, 1 << 20): {"BLOCK": 512, "ROUND": 128, "AT_ONCE": 0, "num_warps": 4},
}
COUNTS_AT_ONCE = 128  # blocks whose counts a program adds up together


class Tiles(NamedTuple):
    """The work of the two products. `order` holds our experts' entries, sorted by expert; tile
    i < used is bounds[1, i] .. bounds[2, i] - 1 of it, all of expert bounds[0, i]. What lies behind
    the last tile is not written."""

    order: Tensor  # [T k] int32; an entry is token * k + choice
    bounds: Tensor  # [3, as many as there may be] int32
    used: Tensor  # [3] int32; behind it two zeros, for programs to count what they have taken


@triton.jit
def _local(ids, entry, num_entries, first_expert, NUM_EXPERTS: tl.constexpr):
    """The local experts of entries, int32; -1 of other ranks' and beyond the last."""
    local = tl.load(ids + entry, mask=entry < num_entries, other=-1).to(tl.int32) - first_expert
    ours = (entry < num_entries) & (local >= 0) & (local < NUM_EXPERTS)
    return tl.where(ours, local, -1)


@triton.jit
def _one_hot(
    ids,
    start,
    num_entries,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """[ROUND, EXPERTS] int32: does entry start + i belong to the local expert e?"""
    local = _local(ids, start + tl.arange(0, ROUND), num_entries, first_expert, NUM_EXPERTS)
    return (local[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _count_all(
    ids,
    before,
    num_entries,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """How many entries each expert has of all, and of the first `before`: [EXPERTS] each."""
    entry = tl.arange(0, AT_ONCE)
    local = _local(ids, entry, num_entries, first_expert, NUM_EXPERTS)
    ours = local >= 0
    local = tl.where(ours, local, 0)
    total = tl.histogram(local, EXPERTS, mask=ours)
    return total, tl.histogram(local, EXPERTS, mask=ours & (entry < before))


@triton.jit(do_not_specialize=["num_entries", "first_expert"])
def _count_kernel(
    ids,
    counts,
    num_entries,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    """ids [T k] -> counts [blocks, EXPERTS]: of BLOCK entries each."""
    wait_for_inputs(PDL)
    block = tl.program_id(0)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in tl.range(block * BLOCK, (block + 1) * BLOCK, ROUND):
        hot = _one_hot(ids, start, num_entries, first_expert, NUM_EXPERTS, EXPERTS, ROUND)
        found += tl.sum(hot, 0)
    tl.store(counts + block * EXPERTS + tl.arange(0, EXPERTS), found)


@triton.jit(do_not_specialize=["num_entries", "num_blocks", "num_tiles", "first_expert"])
def _place_kernel(
    ids,
    counts,
    order,
    bounds,
    used,
    num_entries,
    num_blocks,
    num_tiles,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COUNTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs put BLOCK entries each into their places, the others an expert's tiles.

    An entry stands behind those of all lower experts, then behind its own expert's of earlier
    blocks, then of its own block. Tiles lie together, those of lower experts first: programs
    without work between others cost the products 2 to 9% of their time.
    """
    wait_for_inputs(PDL)
    block, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    earlier = tl.zeros([EXPERTS], tl.int32)
    if AT_ONCE == 0:
        for start in tl.range(0, num_blocks, COUNTS):
            blocks = start + tl.arange(0, COUNTS)[:, None]
            at = counts + blocks * EXPERTS + experts[None, :]
            part = tl.load(at, mask=blocks < num_blocks, other=0)
            total += tl.sum(part, 0)
            earlier += tl.sum(tl.where(blocks < block, part, 0), 0)
    else:  # a launch less
        total, earlier = _count_all(
            ids, block * BLOCK, num_entries, first_expert, NUM_EXPERTS, EXPERTS, AT_ONCE
        )
    begin = tl.cumsum(total, 0) - total  # of each expert
    if block < num_blocks:
        place = begin + earlier
        for start in tl.range(block * BLOCK, (block + 1) * BLOCK, ROUND):
            hot = _one_hot(ids, start, num_entries, first_expert, NUM_EXPERTS, EXPERTS, ROUND)
            places = tl.sum(hot * (place[None, :] + tl.cumsum(hot, 0) - 1), 1)
            local = tl.sum(hot, 1) > 0
            tl.store(order + places, start + tl.arange(0, ROUND), mask=local)
            place += tl.sum(hot, 0)
    else:
        expert = block - num_blocks
        tiles = tl.cdiv(total, BLOCK_M)
        tiles_before = tl.cumsum(tiles, 0) - tiles
        mine = experts == expert
        first, first_tile = (
            tl.sum(tl.where(mine, begin, 0)),
            tl.sum(tl.where(mine, tiles_before, 0)),
        )
        last = first + tl.sum(tl.where(mine, total, 0))
        end_tile = first_tile + tl.sum(tl.where(mine, tiles, 0))
        for start in tl.range(first_tile, end_tile, ROUND):
            tile = start + tl.arange(0, ROUND)
            left = first + (tile - first_tile) * BLOCK_M
            inside = tile < end_tile
            tl.store(bounds + tile, tl.zeros([ROUND], tl.int32) + expert, mask=inside)
            tl.store(bounds + num_tiles + tile, left, mask=inside)
            tl.store(bounds + 2 * num_tiles + tile, tl.minimum(left + BLOCK_M, last), mask=inside)
        if expert == NUM_EXPERTS - 1:
            tl.store(used, end_tile)
            tl.store(used + 1, 0)
            tl.store(used + 2, 0)


def sort_by_expert(ids: Tensor, num_experts: int, first_expert: int, block_m: int) -> Tiles:
    """ids [T, k] -> the tiles of the experts first_expert .. first_expert + num_experts - 1.

    Stable: entries of an expert keep their order.
    """
    num_entries, device = ids.numel(), ids.device
    num_tiles = num_entries // block_m + num_experts
    order = torch.empty(num_entries, dtype=torch.int32, device=device)
    bounds = torch.empty(3, num_tiles, dtype=torch.int32, device=device)
    used = torch.empty(3, dtype=torch.int32, device=device)
    launch, experts = pick(SORT_TABLE, device, num_entries), triton.next_power_of_2(num_experts)
    num_blocks = triton.cdiv(num_entries, launch["BLOCK"])
    overlapping = overlap(device)
    counts = torch.empty(num_blocks, experts, dtype=torch.int32, device=device)
    if not launch["AT_ONCE"]:
        _count_kernel[(num_blocks,)](
            *(ids, counts, num_entries, first_expert),
            NUM_EXPERTS=num_experts,
            EXPERTS=experts,
            BLOCK=launch["BLOCK"],
            ROUND=launch["ROUND"],
            num_warps=launch["num_warps"],
            **overlapping,
        )
    _place_kernel[(num_blocks + num_experts,)](
        *(ids, counts, order, bounds, used, num_entries, num_blocks, num_tiles, first_expert),
        NUM_EXPERTS=num_experts,
        EXPERTS=experts,
        BLOCK_M=block_m,
        COUNTS=COUNTS_AT_ONCE,
        **launch,
        **overlapping,
    )
    return Tiles(order, bounds, used)
