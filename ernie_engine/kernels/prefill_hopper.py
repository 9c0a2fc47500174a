"""prefill_attention on Hopper, in Gluon: see prefill_attention.py for the maths.

A program has 128 (query token, head) pairs. One warp has the copy engine bring tiles of keys and
values, page by page, into shared memory; two groups of four warps compute 64 pairs each and take
turns: while one has its products done, the other is at its softmax. For bf16 and fp16, heads of 128
and pages that fill a tile; for all else prefill_attention.py has a kernel. Never reads a slot at or
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

from ernie_engine.kernels.hopper import barrier, boxes_of
from ernie_engine.kernels.launch import is_hopper
from ernie_engine.kernels.paged_attention import LOG2_E, merge_splits, num_splits, split_buffers

HEAD_DIM = gl.constexpr(128)
PAIRS = gl.constexpr(64)  # of a group of warps
KEYS = gl.constexpr(128)  # of a tile
STAGES = gl.constexpr(3)  # tiles on their way or in use, of keys and of values
BOX = gl.constexpr(64)  # columns that the copy engine brings at once: 128 bytes, its swizzle's span
NEVER = gl.constexpr(1 << 30)  # a position that no query token has
# Registers a thread: what all begin with; then the loading warp leaves some to the computing ones.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
COMPUTING, LOADING = gl.constexpr(232), gl.constexpr(40)

# By programs before keys are split: with 132 multiprocessors, one program each at a time. MIN_KEYS
# from prompts without a prefix, which are slower in parts.
SPLIT_TABLE = {
    ("sm_90", 8): {"SPLITS": 16, "MIN_KEYS": 512},
    ("sm_90", 16): {"SPLITS": 8, "MIN_KEYS": 512},
    ("sm_90", 32): {"SPLITS": 4, "MIN_KEYS": 1024},
    ("sm_90", 66): {"SPLITS": 2, "MIN_KEYS": 2048},
    ("sm_90", 264): {"SPLITS": 4, "MIN_KEYS": 2048},
    ("sm_90", 265): {"SPLITS": 1, "MIN_KEYS": 2048},
}
SPLIT_CANDIDATES = [{"SPLITS": splits, "MIN_KEYS": 512} for splits in (1, 2, 4, 8, 16)]


def takes(q: Tensor, k_cache: Tensor) -> bool:
    """Whether the kernel is made for these tensors and their card."""
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    return (
        is_hopper(q.device)
        and q.dtype in (torch.bfloat16, torch.float16)
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
    place,
    tiles,
    num_blocks,
    PAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """The loading warp. The last page is read such that it ends with the context's last key: what
    would stand before its first slot is outside the tensor and becomes zeros."""
    k_full, k_empty, v_full, v_empty, _ = barriers
    kv_head, _, _, _, context = place
    first_tile, num_tiles, _ = tiles
    num_pages = (context + BLOCK_SIZE - 1) // BLOCK_SIZE
    last_page = num_pages - 1
    shift = context - num_pages * BLOCK_SIZE  # <= 0
    first_page = first_tile * PAGES
    ids = _page_ids(table, first_page, num_pages, num_blocks, PAGES)
    column = kv_head * HEAD_DIM
    for j in range(num_tiles):
        stage, phase = j % STAGES, (j // STAGES) & 1
        ahead = _page_ids(table, first_page + PAGES, num_pages, num_blocks, PAGES)
        where = first_page, last_page, shift, column, stage, phase
        _copy_tile(k_cache, k_pages, k_full, k_empty, ids, *where, PAGES, BLOCK_SIZE)
        _copy_tile(v_cache, v_pages, v_full, v_empty, ids, *where, PAGES, BLOCK_SIZE)
        ids = ahead
        first_page += PAGES


@gluon.jit
def _mask(scores, start, positions, context, BLOCK_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf where a key is not to be seen; keys of the last page lie as _load() has moved them."""
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    visible = positions + 1 - start
    last_page = (context - 1) // BLOCK_SIZE * BLOCK_SIZE - start  # its first column
    shift = last_page + start + BLOCK_SIZE - context  # by so many columns its keys are moved
    if (shift > 0) & (last_page < KEYS):
        keys = gl.where(columns < last_page, columns, columns - shift)
        keys = gl.where((columns >= last_page) & (keys < last_page), NEVER, keys)
        return gl.where(keys[None, :] < visible[:, None], scores, float("-inf"))
    else:
        return gl.where(columns[None, :] < visible[:, None], scores, float("-inf"))


@gluon.jit
def _softmax(scores, top, total, scale):
    """Weights, the new top and total, and what is kept of all sums before."""
    new_top = gl.maximum(top, gl.max(scores, 1))
    keep = gl.exp2((top - new_top) * scale)
    p = gl.exp2(scores * scale - (new_top * scale)[:, None])
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _pairs(
    place, MINE: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Of PAIRS pairs of a group of warps: the query tokens, the rows of q, and which are real."""
    kv_head, first_token, first_query, num_queries, _ = place
    m = MINE * PAIRS + gl.arange(0, PAIRS, LAYOUT)
    query = first_query + m // GROUP
    pair = (first_token + query).to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP
    return query, pair, (query < num_queries) & (m < 2 * PAIRS // GROUP * GROUP)


@gluon.jit
def _compute(
    q,
    results,
    q_tile,
    k_tiles,
    v_tiles,
    barriers,
    place,
    tiles,
    scale,
    MINE: gl.constexpr,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """A group of computing warps, the first (MINE 0) or the second: PAIRS of the program's pairs
    against `num_tiles` tiles from `first_tile` on, of which `seen_by_all` need no mask."""
    values, lse, first_result = results
    k_full, k_empty, v_full, v_empty, turns = barriers
    _, _, _, num_queries, context = place
    first_tile, num_tiles, seen_by_all = tiles
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    _, pair, real = _pairs(place, MINE, GROUP, KV_HEADS, gl.SliceLayout(1, MEMORY))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
    places = pair[:, None] * HEAD_DIM + dims[None, :]
    q_tile.store(gl.load(q + places, mask=real[:, None], other=0.0))
    fence_async_shared()
    barrier()

    query, pair, is_pair = _pairs(place, MINE, GROUP, KV_HEADS, ROWS)
    positions = context - num_queries + query
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
    if seen_by_all < 1:
        scores = _mask(scores, first_tile * KEYS, positions, context, BLOCK_SIZE, SCORES)
    p, top, total, keep = _softmax(scores, top, total, scale)
    weights = gl.convert_layout(p.to(q_tile.dtype), WEIGHTS)
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
                start = (first_tile + j) * KEYS
                scores = _mask(scores, start, positions, context, BLOCK_SIZE, SCORES)
            p, top, total, keep = _softmax(scores, top, total, scale)
            now = gl.convert_layout(p.to(q_tile.dtype), WEIGHTS)
            acc, weights, now = warpgroup_mma_wait(0, deps=(sums, weights, now))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
            weights = now
    last = num_tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    sums = warpgroup_mma(weights, v_tiles.index(last % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
    if SPLITS == 1:
        q_tile.store(acc.to(q_tile.dtype))
        barrier()
        gl.store(values + places, q_tile.load(MEMORY), mask=real[:, None])
    else:
        # A pair that sees nothing of this range has NaN for values and, by its -inf, no weight.
        result = first_result + pair
        logarithm = gl.where(total > 0, top * scale + gl.log2(total), float("-inf"))
        gl.store(lse + result, logarithm, mask=is_pair)
        rows = gl.convert_layout(result, gl.SliceLayout(1, SUMS))[:, None] * HEAD_DIM
        columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, SUMS))[None, :]
        is_row = gl.convert_layout(is_pair, gl.SliceLayout(1, SUMS))[:, None]
        gl.store(values + rows + columns, acc, mask=is_row)


# What differs from step to step makes no kernel of its own.
@gluon.jit(
    do_not_specialize=[
        *("block_tables", "query_start", "context_lens"),
        *("num_tokens", "num_rows", "table_width", "num_blocks"),
    ]
)
def _prefill_hopper_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    context_lens,
    values,
    lse,
    scale,
    num_tokens,
    num_rows,
    table_width,
    num_blocks,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """The query tokens of a tile, all heads of a group, against one of SPLITS ranges of what they
    may see -> values [SPLITS, T, Hq, D], lse [SPLITS, T, Hq]."""
    BLOCK_Q: gl.constexpr = 2 * PAIRS // GROUP
    PAGES: gl.constexpr = KEYS // BLOCK_SIZE
    split, kv_head = gl.program_id(0), gl.program_id(1)
    tile = gl.num_programs(2) - 1 - gl.program_id(2)  # a row's last tokens have most to do
    row, row_tile = _find_row(query_start, num_rows, tile, BLOCK_Q)
    first_token = gl.load(query_start + row)
    num_queries = gl.load(query_start + row + 1) - first_token
    first_query = (tile - row_tile) * BLOCK_Q
    if first_query >= num_queries:
        return
    context = gl.load(context_lens + row)
    first_position = context - num_queries + first_query
    end = gl.minimum(first_position + BLOCK_Q, context)
    all_tiles = (end + KEYS - 1) // KEYS
    per_split = (all_tiles + SPLITS - 1) // SPLITS
    first_tile = split * per_split
    # A range of no key is computed like one of one tile: all masked.
    num_tiles = gl.maximum(gl.minimum(per_split, all_tiles - first_tile), 1)
    seen_by_all = gl.minimum((first_position + 1) // KEYS - first_tile, num_tiles)
    first_result = split.to(gl.int64) * num_tokens * (KV_HEADS * GROUP)

    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DTYPE: gl.constexpr = q.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, PAIRS, HEAD_DIM], TILE)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HEAD_DIM], TILE)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, HEAD_DIM], TILE)
    # The same memory page by page: a tile lies there as halves of BOX columns.
    PIECES: gl.constexpr = STAGES * (HEAD_DIM // BOX) * PAGES
    k_pages = k_tiles._reinterpret(DTYPE, [PIECES, 1, BLOCK_SIZE, BOX], PAGE)
    v_pages = v_tiles._reinterpret(DTYPE, [PIECES, 1, BLOCK_SIZE, BOX], PAGE)
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
    place = (kv_head, first_token, first_query, num_queries, context)
    tiles = (first_tile, num_tiles, seen_by_all)
    results = (values, lse, first_result)
    table = block_tables + row * table_width
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (q, results, q_tiles.index(0), k_tiles, v_tiles, barriers, place, tiles,
                        scale, 0, GROUP, KV_HEADS, BLOCK_SIZE, SPLITS)),
            (_compute, (q, results, q_tiles.index(1), k_tiles, v_tiles, barriers, place, tiles,
                        scale, 1, GROUP, KV_HEADS, BLOCK_SIZE, SPLITS)),
            (_load, (k_cache, v_cache, k_pages, v_pages, barriers, table, place, tiles, num_blocks,
                     PAGES, BLOCK_SIZE)),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )
    # fmt: on


def num_programs(q: Tensor, k_cache: Tensor, num_rows: int) -> int:
    """Before keys are split: what SPLIT_TABLE goes by."""
    kv_heads = k_cache.shape[2]
    block_q = 2 * PAIRS.value // (q.shape[1] // kv_heads)
    return (len(q) // block_q + num_rows) * kv_heads  # see _find_row()


def prefill_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """As prefill_attention_triton() for what takes() says and at least one token."""
    (num_tokens, num_heads, _), num_rows = q.shape, len(context_lens)
    num_blocks, block_size, kv_heads = k_cache.shape[:3]
    group = num_heads // kv_heads
    programs, max_context = num_programs(q, k_cache, num_rows), block_tables.shape[1] * block_size
    splits = num_splits(SPLIT_TABLE, programs, max_context, q.device)
    out = torch.empty_like(q)
    values, lse = split_buffers(out, splits)
    box = 1, block_size, BOX.value  # of [blocks, block_size, Hkv D]
    keys, vals = boxes_of(k_cache.flatten(2), *box), boxes_of(v_cache.flatten(2), *box)
    _prefill_hopper_kernel[splits, kv_heads, programs // kv_heads](
        *(q, keys, vals, block_tables, query_start, context_lens),
        *(values, lse, scale * LOG2_E, num_tokens, num_rows, block_tables.stride(0), num_blocks),
        GROUP=group,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        SPLITS=splits,
        **LAUNCH,
    )
    merge_splits(values, lse, query_start, out)
    return out
