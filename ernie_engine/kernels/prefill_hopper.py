"""prefill_attention on Hopper, in Gluon: see prefill_attention.py for the maths.

A program has 128 (query token, head) pairs. One warp has the copy engine bring tiles of keys and
values, page by page, into shared memory; two groups of four warps compute 64 pairs each and take
turns: while one has its products done, the other is at its softmax. For bf16, heads of 128 and
pages that fill a tile; for all else prefill_attention.py has a kernel. Never reads a slot at or
after a row's context.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ernie_engine.kernels.launch import is_hopper
from ernie_engine.kernels.paged_attention import LOG2_E

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6 has the former, 3.7 this
HEAD_DIM = gl.constexpr(128)
PAIRS = gl.constexpr(64)  # of a group of warps
KEYS = gl.constexpr(128)  # of a tile
STAGES = gl.constexpr(2)  # tiles on their way or in use, of keys and of values
BOX = gl.constexpr(64)  # columns that the copy engine brings at once: 128 bytes, its swizzle's span
NEVER = gl.constexpr(1 << 30)  # a position that no query token has
# Registers a thread: what all begin with; then the loading warp leaves some to the computing ones.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
COMPUTING, LOADING = gl.constexpr(232), gl.constexpr(40)


def takes(q: Tensor, k_cache: Tensor) -> bool:
    """Whether the kernel is made for these tensors and their card."""
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    return (
        is_hopper(q.device)
        and q.dtype == torch.bfloat16
        and head_dim == HEAD_DIM.value
        and 16 <= block_size <= KEYS.value
        and q.shape[1] // kv_heads <= 2 * PAIRS.value
    )


@gluon.jit
def _find_row(query_start, num_rows, tile, BLOCK_Q: gl.constexpr):
    """As in prefill_attention.py: the row that a tile belongs to, and its first tile."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low, gl.load(query_start + low) // BLOCK_Q + low


@gluon.jit
def _page_ids(table, first, num_pages, nowhere, PAGES: gl.constexpr):
    """A tuple of PAGES block ids from `first` on; behind the last page `nowhere`, which reads 0."""
    if PAGES == 1:
        return (gl.load(table + first, mask=first < num_pages, other=nowhere),)
    else:
        HALF: gl.constexpr = PAGES // 2
        left = _page_ids(table, first, num_pages, nowhere, HALF)
        return left + _page_ids(table, first + HALF, num_pages, nowhere, HALF)


@gluon.jit
def _copy_tile(
    cache,
    pages,
    full,
    empty,
    ids,
    first_page,
    last_page,
    shift,
    column,
    stage,
    phase,
    PAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """PAGES pages of one K/V head into a stage's tile, once its readers have left it."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    there = full.index(stage)
    mbarrier.expect(there, PAGES * BLOCK_SIZE * HEAD_DIM * 2)
    HALVES: gl.constexpr = HEAD_DIM // BOX
    for p in gl.static_range(PAGES):
        row = gl.where(first_page + p == last_page, shift, 0)
        for half in gl.static_range(HALVES):
            place = pages.index((stage * HALVES + half) * PAGES + p)
            tma.async_copy_global_to_shared(cache, [ids[p], row, column + half * BOX], there, place)


@gluon.jit
def _load(
    k_cache,
    v_cache,
    k_pages,
    v_pages,
    barriers,
    table,
    context,
    num_blocks,
    kv_head,
    num_tiles,
    PAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """The loading warp. The last page is read such that it ends with the context's last key: what
    would stand before its first slot is outside the tensor and becomes zeros."""
    k_full, k_empty, v_full, v_empty, _ = barriers
    num_pages = (context + BLOCK_SIZE - 1) // BLOCK_SIZE
    last_page = num_pages - 1
    shift = context - num_pages * BLOCK_SIZE  # <= 0
    ids = _page_ids(table, 0, num_pages, num_blocks, PAGES)
    column = kv_head * HEAD_DIM
    for j in range(num_tiles):
        stage, phase = j % STAGES, (j // STAGES) & 1
        ahead = _page_ids(table, (j + 1) * PAGES, num_pages, num_blocks, PAGES)
        where = j * PAGES, last_page, shift, column, stage, phase
        _copy_tile(k_cache, k_pages, k_full, k_empty, ids, *where, PAGES, BLOCK_SIZE)
        _copy_tile(v_cache, v_pages, v_full, v_empty, ids, *where, PAGES, BLOCK_SIZE)
        ids = ahead


@gluon.jit
def _mask(scores, start, positions, context, BLOCK_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf where a key is not to be seen; keys of the last page lie as _load() has moved them."""
    keys = start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    last_page = (context - 1) // BLOCK_SIZE * BLOCK_SIZE  # its first key
    moved = keys + (context - last_page - BLOCK_SIZE)
    keys = gl.where(keys >= last_page, gl.where(moved < last_page, NEVER, moved), keys)
    keys = gl.where(keys < context, keys, NEVER)
    return gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))


@gluon.jit
def _softmax(scores, top, total, scale):
    """Weights, the new top and total, and what is kept of all sums before."""
    new_top = gl.maximum(top, gl.max(scores, 1))
    keep = gl.exp2((top - new_top) * scale)
    p = gl.exp2(scores * scale - (new_top * scale)[:, None])
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _compute(
    q,
    out,
    q_tile,
    k_tiles,
    v_tiles,
    barriers,
    place,
    kv_head,
    scale,
    num_tiles,
    seen_by_all,
    MINE: gl.constexpr,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """A group of computing warps, the first (MINE 0) or the second: PAIRS of the program's pairs
    against tiles 0 .. num_tiles - 1, of which `seen_by_all` need no mask."""
    k_full, k_empty, v_full, v_empty, turns = barriers
    first_token, first_query, num_queries, first_position, context = place
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = MINE * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(1, MEMORY))
    query = first_query + m // GROUP
    real = (query < num_queries) & (m < 2 * PAIRS // GROUP * GROUP)
    pair = (first_token + query).to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
    places = pair[:, None] * HEAD_DIM + dims[None, :]
    q_tile.store(gl.load(q + places, mask=real[:, None], other=0.0))
    fence_async_shared()
    barrier()

    positions = first_position + (MINE * PAIRS + gl.arange(0, PAIRS, ROWS)) // GROUP
    zeros = gl.zeros([PAIRS, KEYS], gl.float32, SCORES)
    acc = gl.zeros([PAIRS, HEAD_DIM], gl.float32, SUMS)
    top = gl.full([PAIRS], float("-inf"), gl.float32, ROWS)
    total = gl.full([PAIRS], 0.0, gl.float32, ROWS)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(turns.index(MINE), 0)
    keys = k_tiles.index(0).permute((1, 0))
    scores = warpgroup_mma(q_tile, keys, zeros, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index(1 - MINE), count=1)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    scores = _mask(scores, 0, positions, context, BLOCK_SIZE, SCORES)
    p, top, total, keep = _softmax(scores, top, total, scale)
    weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
    for masked in gl.static_range(2):
        if masked == 0:
            begin, end = 1, seen_by_all
        else:
            begin, end = gl.maximum(seen_by_all, 1), num_tiles
        for j in range(begin, end):
            # The scores of this tile and the sums of the last one, whose weights are there.
            stage, before = j % STAGES, (j - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
            mbarrier.wait(turns.index(MINE), j & 1)
            keys = k_tiles.index(stage).permute((1, 0))
            scores = warpgroup_mma(q_tile, keys, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
            sums = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - MINE), count=1)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if masked == 1:
                scores = _mask(scores, j * KEYS, positions, context, BLOCK_SIZE, SCORES)
            p, top, total, keep = _softmax(scores, top, total, scale)
            now = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
            acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
            weights = now
    last = num_tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    sums = warpgroup_mma(weights, v_tiles.index(last % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
    q_tile.store(acc.to(gl.bfloat16))
    barrier()
    gl.store(out + places, q_tile.load(MEMORY), mask=real[:, None])


# What differs from step to step makes no kernel of its own.
@gluon.jit(
    do_not_specialize=[
        *("block_tables", "query_start", "context_lens"),
        *("num_rows", "table_width", "num_blocks"),
    ]
)
def _prefill_hopper_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    context_lens,
    out,
    scale,
    num_rows,
    table_width,
    num_blocks,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """The query tokens of a tile, all heads of a group, against all that they may see."""
    BLOCK_Q: gl.constexpr = 2 * PAIRS // GROUP
    PAGES: gl.constexpr = KEYS // BLOCK_SIZE
    kv_head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # a row's last tokens have most to do
    row, first_tile = _find_row(query_start, num_rows, tile, BLOCK_Q)
    first_token = gl.load(query_start + row)
    num_queries = gl.load(query_start + row + 1) - first_token
    first_query = (tile - first_tile) * BLOCK_Q
    context = gl.load(context_lens + row)
    first_position = context - num_queries + first_query
    end = gl.minimum(first_position + BLOCK_Q, context)
    # A tile of no query token is computed like one of one tile of keys, and not stored.
    num_tiles = gl.where(first_query < num_queries, gl.maximum((end + KEYS - 1) // KEYS, 1), 1)
    seen_by_all = gl.minimum((first_position + 1) // KEYS, num_tiles)

    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, PAIRS, HEAD_DIM], TILE)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, HEAD_DIM], TILE)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, HEAD_DIM], TILE)
    # The same memory page by page: a tile lies there as halves of BOX columns.
    PIECES: gl.constexpr = STAGES * (HEAD_DIM // BOX) * PAGES
    k_pages = k_tiles._reinterpret(gl.bfloat16, [PIECES, 1, BLOCK_SIZE, BOX], PAGE)
    v_pages = v_tiles._reinterpret(gl.bfloat16, [PIECES, 1, BLOCK_SIZE, BOX], PAGE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    barriers = (k_full, k_empty, v_full, v_empty, turns)
    place = (first_token, first_query, num_queries, first_position, context)
    table = block_tables + row * table_width
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (q, out, q_tiles.index(0), k_tiles, v_tiles, barriers, place, kv_head, scale,
                        num_tiles, seen_by_all, 0, GROUP, KV_HEADS, BLOCK_SIZE)),
            (_compute, (q, out, q_tiles.index(1), k_tiles, v_tiles, barriers, place, kv_head, scale,
                        num_tiles, seen_by_all, 1, GROUP, KV_HEADS, BLOCK_SIZE)),
            (_load, (k_cache, v_cache, k_pages, v_pages, barriers, table, context, num_blocks,
                     kv_head, num_tiles, PAGES, BLOCK_SIZE)),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )
    # fmt: on


def _descriptor(cache: Tensor) -> TensorDescriptor:
    """cache [blocks, block_size, Hkv, D] for the copy engine: [blocks, block_size, Hkv D]."""
    view = cache.flatten(2)
    box = [1, cache.shape[1], BOX.value]
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return TensorDescriptor(view, list(view.shape), list(view.stride()), box, layout)


def prefill_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """As prefill_attention_triton() for what takes() says and at least one token, in one piece."""
    (num_tokens, num_heads, _), num_rows = q.shape, len(context_lens)
    num_blocks, block_size, kv_heads = k_cache.shape[:3]
    group = num_heads // kv_heads
    out = torch.empty_like(q)
    num_tiles = num_tokens // (2 * PAIRS.value // group) + num_rows  # see _find_row()
    _prefill_hopper_kernel[kv_heads, num_tiles](
        *(q, _descriptor(k_cache), _descriptor(v_cache), block_tables, query_start, context_lens),
        *(out, scale * LOG2_E, num_rows, block_tables.stride(0), num_blocks),
        GROUP=group,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        **LAUNCH,
    )
    return out
