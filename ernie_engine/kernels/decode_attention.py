"""Causal attention over a row's paged context, for many rows with 1 to 8 query tokens each.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],   j <= position of t

The same maths and arguments as prefill_attention; the shape of the work differs: here reading
the cache is the cost. Never reads a slot beyond a row's context: blocks are reused and those
slots may hold anything, NaN too.

The kernel cuts each context into `SPLITS` ranges, a program each, or one long row would keep
one program busy and the card idle; the last program of a row puts them together. Grids depend on
the shapes of tensors alone: ranges that a short row does not fill end at once.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, ask_for_rows, overlap, pick, wait_for_inputs
from ernie_engine.kernels.paged_attention import (
    LOG2_E,
    STEP_ARGUMENTS,
    attend,
    check_layout,
    split_buffers,
    store_split,
)
from ernie_engine.kernels.products import empty_sum
from ernie_engine.kernels.tickets import is_last, tickets

# By rows x K/V heads, the number of programs before a context is split. WIDE: a tile, in
# WIDE_STAGES, for contexts whose ranges then have one each; 0: as the others.
TABLE = {
    (DEFAULT, 16): {"SPLITS": 8, "BLOCK_N": 64, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    (DEFAULT, 128): {"SPLITS": 4, "BLOCK_N": 64, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    (DEFAULT, 512): {"SPLITS": 1, "BLOCK_N": 64, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    ("sm_90", 1): {"SPLITS": 64, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 4): {"SPLITS": 32, "BLOCK_N": 128, "WIDE": 128, "num_warps": 4, "num_stages": 5},
    ("sm_90", 8): {"SPLITS": 16, "BLOCK_N": 128, "WIDE": 128, "num_warps": 4, "num_stages": 5},
    ("sm_90", 16): {"SPLITS": 8, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 32): {"SPLITS": 4, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 64): {"SPLITS": 2, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 128): {"SPLITS": 1, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 256): {"SPLITS": 1, "BLOCK_N": 128, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    ("sm_90", 1024): {"SPLITS": 1, "BLOCK_N": 64, "WIDE": 0, "num_warps": 4, "num_stages": 2},
}
CANDIDATES = [
    {"SPLITS": splits, "BLOCK_N": n, "WIDE": wide, "num_warps": warps, "num_stages": stages}
    for splits in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    # Two stages a step: block ids, then keys. The fewer, the more programs have room.
    for n, wide, warps, stages in (
        (32, 0, 2, 5),
        (64, 0, 2, 5),
        (64, 0, 4, 2),
        (64, 0, 4, 3),
        (64, 0, 4, 5),
        (128, 0, 4, 2),
        (128, 0, 4, 3),
        (128, 0, 4, 5),
        (128, 128, 4, 5),
        (128, 256, 8, 5),
    )
]
# Products of fp32 run without tensor cores: tiles of operands must fit into registers.
TABLE_FP32 = {
    (DEFAULT, 16): {"SPLITS": 8, "BLOCK_N": 16, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    (DEFAULT, 128): {"SPLITS": 4, "BLOCK_N": 16, "WIDE": 0, "num_warps": 4, "num_stages": 2},
    (DEFAULT, 512): {"SPLITS": 1, "BLOCK_N": 16, "WIDE": 0, "num_warps": 4, "num_stages": 2},
}
WIDE_STAGES = tl.constexpr(3)  # of a wide tile: block ids, then keys and values
WIDE_ROWS = 16  # rows of a product beside which shared memory has room for a wide tile
MIN_SPLIT_KEYS = 64  # a range has no fewer: merging would cost more than it saves
MERGED_NUMBERS = 8192  # numbers, of several splits, that a merging program asks for together
# From so many on a launch has up to four programs before contexts are split, and waits for its
# first keys: they are asked for while the launch before still runs. 1.3% of a step of one row of
# 21B behind 32k; with more rows, nothing.
AHEAD_SPLITS = 32
MAX_GATHERED_TOKENS = 1 << 18  # rows x longest context of one padded batch


@triton.jit
def key_places(
    table,
    first,
    context,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Where the keys first, ... of a row begin in the cache [AHEAD]; the last one's instead of what
    lies behind `context`."""
    keys = tl.minimum(first + tl.arange(0, AHEAD), context - 1)
    blocks = tl.load(table + keys // BLOCK_SIZE, cache_modifier=".cg")
    slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    return (slots * KV_HEADS + kv_head) * HEAD_DIM


@triton.jit
def _merge(
    values,
    lse,
    out,
    used,
    stride,
    first_pair,
    num_queries,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """out[pair] = sum_s 2^(lse[s, pair] - max lse) values[s, pair] / sum_s 2^(...), over the `used`
    splits, for the row's query tokens and the heads of one group; see _split_kernel()."""
    m, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    real = m < num_queries * GROUP
    pair = first_pair + (m // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + m % GROUP
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # In loops, for no sum then crosses threads. AT_ONCE splits are loaded together and share one
    # step of the maximum, which is finite: every query sees a key of the first. Rows that are not
    # real load nothing, and what they hold is not stored.
    row_lse, row_values = lse + pair, values + pair[:, None] * HEAD_DIM + dims[None, :]
    for start in tl.range(0, used, AT_ONCE):
        new_top, parts, tiles = top, (), ()
        for i in tl.static_range(AT_ONCE):
            result = tl.minimum(start + i, used - 1) * stride
            part = tl.load(row_lse + result, mask=real, cache_modifier=".cg")
            tile = row_values + result * HEAD_DIM
            tiles += (tl.load(tile, mask=real[:, None], cache_modifier=".cg"),)
            part = tl.where(start + i < used, part, float("-inf"))
            new_top = tl.maximum(new_top, part)
            parts += (part,)
        keep = tl.exp2(top - new_top)
        acc, total, top = acc * keep[:, None], total * keep, new_top
        for i in tl.static_range(AT_ONCE):
            weight = tl.exp2(parts[i] - top)
            acc += weight[:, None] * tiles[i]
            total += weight
    acc /= total[:, None]
    places = out + pair[:, None] * HEAD_DIM + dims[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _split_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    context_lens,
    values,
    lse,
    out,
    tickets,
    scale,
    num_tokens,
    table_width,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, K/V head and range of keys -> values [SPLITS, T, Hq, D], lse [SPLITS, T, Hq].

    A context fills as many of the SPLITS ranges as have LEAST keys each; the program that finishes
    last puts them together. With one range that is all: straight to `out`.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_start + row, cache_modifier=".cg")
    num_queries = tl.load(query_start + row + 1, cache_modifier=".cg") - first_token
    context = tl.load(context_lens + row, cache_modifier=".cg")
    is_wide = context <= SPLITS * WIDE
    tile = tl.where(is_wide, WIDE, BLOCK_N)
    per_split = tl.cdiv(tl.maximum(tl.cdiv(context, SPLITS), LEAST), tile) * tile
    first = split * per_split
    table = block_tables + row * table_width
    if AHEAD and (num_queries > 0) & (first < context):
        where = key_places(table, first, context, kv_head, KV_HEADS, HEAD_DIM, BLOCK_SIZE, AHEAD)
        ask_for_rows(k_cache + where, HEAD_DIM, PDL)
        ask_for_rows(v_cache + where, HEAD_DIM, PDL)
    # No key is loaded before: a row may share blocks that the launch before is writing.
    wait_for_inputs(PDL)
    if (num_queries == 0) | (first >= context):
        return
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP * QUERIES)
    m = tl.arange(0, max(16, ROWS))  # the least rows of a product
    real = m < num_queries * GROUP
    first_pair = first_token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP
    pair = first_pair + (m // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + m % GROUP
    stride = num_tokens.to(tl.int64) * (KV_HEADS * GROUP)
    dims = tl.arange(0, HEAD_DIM)
    q_tile = tl.load(q + pair[:, None] * HEAD_DIM + dims[None, :], mask=real[:, None], other=0)
    positions = context - num_queries + m // GROUP
    end = tl.minimum(first + per_split, context)
    acc = empty_sum(max(16, ROWS), HEAD_DIM, q.dtype.element_ty)
    total = tl.zeros([max(16, ROWS)], acc.dtype)
    top = tl.full([max(16, ROWS)], float("-inf"), tl.float32)
    if WIDE and is_wide:
        acc, total, top = attend(
            *(q_tile, positions, acc, total, top, k_cache, v_cache, table, kv_head, first, end),
            *(scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, WIDE, WIDE_STAGES, True),
        )
    else:
        acc, total, top = attend(
            *(q_tile, positions, acc, total, top, k_cache, v_cache, table, kv_head, first, end),
            *(scale, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, STAGES, True),
        )
    used = tl.cdiv(context, per_split)
    if SPLITS == 1 or used == 1:
        store_split(acc, total, top, out, lse, pair, real, HEAD_DIM, 1)
    else:
        result = split * stride + pair
        store_split(acc, total, top, values, lse, result, real, HEAD_DIM, SPLITS)
        if is_last(tickets + row * KV_HEADS + kv_head, used):
            _merge(
                values,
                lse,
                out,
                used,
                stride,
                first_pair,
                num_queries,
                GROUP,
                KV_HEADS,
                HEAD_DIM,
                ROWS,
                AT_ONCE,
            )


def decode_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    max_query_len: int,
) -> Tensor:
    """As the twin, all tensors contiguous (block_tables: its rows). D and block_size are powers
    of two, D at least 16. Tokens from query_start[R] on are padding and left unwritten.
    block_tables, query_start and context_lens are not what the launch before wrote: see
    wait_for_inputs()."""
    (num_tokens, num_heads, head_dim), num_rows = q.shape, len(context_lens)
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    check_layout(q, k_cache, v_cache, block_tables)
    table = TABLE_FP32 if q.dtype == torch.float32 else TABLE
    launch = pick(table, q.device, num_rows * kv_heads)
    values, lse = split_buffers(out, launch["SPLITS"])
    counters = tickets("decode_attention", q.device)
    assert num_rows * kv_heads <= len(counters)
    rows = triton.next_power_of_2(num_heads // kv_heads * max_query_len)
    _split_kernel[launch["SPLITS"], kv_heads, num_rows](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start,
        context_lens,
        values,
        lse,
        out,
        counters,
        scale * LOG2_E,
        num_tokens,
        block_tables.stride(0),
        GROUP=num_heads // kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERIES=max_query_len,
        STAGES=launch["num_stages"],
        LEAST=MIN_SPLIT_KEYS,
        AHEAD=launch["BLOCK_N"] if launch["SPLITS"] >= AHEAD_SPLITS else 0,
        AT_ONCE=max(1, min(launch["SPLITS"], MERGED_NUMBERS // (rows * head_dim))),
        **{**launch, "WIDE": launch["WIDE"] if rows <= WIDE_ROWS else 0},
        **overlap(q.device),
    )
    return out


def _gather_context(cache: Tensor, block_tables: Tensor, token: Tensor) -> Tensor:
    """cache [num_blocks, block_size, Hkv, D], block_tables [B, M], token [B, C], the index of
    each wanted token in its row -> [B, Hkv, C, D]."""
    block_size = cache.shape[1]
    blocks = block_tables.gather(1, token // block_size)  # [B, C]
    return cache[blocks, token % block_size].transpose(1, 2)


def _batch_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, num_kv_heads: int, scale: float
) -> Tensor:
    """q [B, N, Hq, D], k, v [B, Hkv, C, D], positions [B, N] of q's tokens -> [B, N, Hq, D].

    The query heads of a group become query tokens of their K/V head, so that no K/V is copied.
    """
    num_queries = q.shape[1]
    q = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, group, N, D]
    key_positions = torch.arange(k.shape[2], device=q.device)
    mask = key_positions <= positions[:, None, :, None]  # [B, 1, N, C]
    out = F.scaled_dot_product_attention(
        q.flatten(2, 3), k, v, attn_mask=mask.repeat(1, 1, q.shape[2], 1), scale=scale
    )
    return out.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def decode_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    max_query_len: int,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D], T = query_start[R].

    k_cache, v_cache [num_blocks, block_size, Hkv, D], already holding the query tokens' own K/V;
    block_tables [R, M] int32; query_start [R + 1] int32, cumulative query tokens; context_lens
    [R] int32 = cached + query tokens; `max_query_len`, the most query tokens of a row. Rows
    without query tokens are passed over.
    """
    out = torch.empty_like(q)
    rows = query_start.diff().nonzero().flatten()
    if rows.numel() == 0:
        return out
    rows_per_batch = max(1, MAX_GATHERED_TOKENS // int(context_lens.max()))
    for batch in rows.split(rows_per_batch):
        starts, context = query_start[batch, None].long(), context_lens[batch, None].long()
        counts = query_start[batch + 1, None] - starts  # [B, 1]
        step = torch.arange(max_query_len, device=q.device)
        # A short row is padded with its own last token, so that no padding can be NaN.
        query = torch.minimum(step, counts - 1)  # [B, N]
        token = torch.minimum(torch.arange(int(context.max()), device=q.device), context - 1)
        k, v = (_gather_context(c, block_tables[batch], token) for c in (k_cache, v_cache))
        positions = context - counts + query
        y = _batch_attention(q[starts + query], k, v, positions, k_cache.shape[2], scale)
        real = step < counts  # [B, N]
        out[(starts + query)[real]] = y[real]
    return out


IMPLEMENTATIONS = {
    "decode_attention": {"triton": decode_attention_triton, "torch": decode_attention_torch}
}
