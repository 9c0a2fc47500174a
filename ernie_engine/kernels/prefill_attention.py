"""Causal attention of new tokens over a row's paged context, for rows with many query tokens.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],   j <= position of t

A row's query tokens are the last of its context; what stands before them was cached earlier.
Query head i reads K/V head i // (Hq / Hkv). Never reads a slot beyond a row's context: blocks
are reused and those slots may hold anything.

The kernel reads K and V where they lie, through the block table. torch ships nothing that does:
its paged kernels want pages of 256 tokens, and its plain ones a copy of the cached prefix. A few
tokens behind a long prefix make few tiles: then keys are split over programs as for decoding. On
an H100 or H200 nearly all of it is prefill_hopper.py's; the rest runs here with the default rows.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (a launch gives ints where a kernel has constexprs; a kernel's loops are not Python's)

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, pick
from ernie_engine.kernels.paged_attention import (
    LOG2_E,
    STEP_ARGUMENTS,
    attend,
    check_layout,
    merge_splits,
    num_splits,
    split_buffers,
    store_empty_split,
    store_split,
)
from ernie_engine.kernels.prefill_hopper import prefill_attention_hopper, takes
from ernie_engine.kernels.products import empty_sum

# By query tokens of the batch.
TABLE = {
    (DEFAULT, 1 << 20): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
}
CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps in (
        *((16, 64, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4)),
        *((128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8)),
    )
    for stages in (3, 5)  # two a step: block ids, then keys
]
# Products of fp32 run without tensor cores: tiles of operands must fit into registers.
TABLE_FP32 = {(DEFAULT, 1 << 20): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}}

# By programs before keys are split.
SPLIT_TABLE = {
    (DEFAULT, 16): {"SPLITS": 8, "MIN_KEYS": 512},
    (DEFAULT, 64): {"SPLITS": 2, "MIN_KEYS": 512},
    (DEFAULT, 65): {"SPLITS": 1, "MIN_KEYS": 512},
}
SPLIT_CANDIDATES = [{"SPLITS": splits, "MIN_KEYS": 512} for splits in (1, 2, 4, 8, 16, 32)]

MAX_MASK_ELEMENTS = 1 << 26  # query tokens x context tokens of one masked product


def _launch(q: Tensor) -> Mapping[str, int]:
    return pick(TABLE_FP32 if q.dtype == torch.float32 else TABLE, q.device, len(q))


def _num_tiles(q: Tensor, kv_heads: int, num_rows: int) -> int:
    """At most so many: see _find_row()."""
    return len(q) // (_launch(q)["BLOCK_M"] // (q.shape[1] // kv_heads)) + num_rows


def num_programs(q: Tensor, k_cache: Tensor, num_rows: int) -> int:
    """Before keys are split: what SPLIT_TABLE goes by."""
    kv_heads = k_cache.shape[2]
    return _num_tiles(q, kv_heads, num_rows) * kv_heads


@triton.jit
def _find_row(query_start, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The last row whose tiles begin at or before `tile`; the row's first tile.

    Row r's tiles begin at query_start[r] // BLOCK_Q + r: no two rows share one, each has at
    least as many as it needs and at most one more, and nobody has to count.
    """
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tl.load(query_start + low) // BLOCK_Q + low


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _prefill_kernel(
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
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """BLOCK_M // GROUP query tokens of a row, all heads of a group, against one of SPLITS ranges
    of what they may see -> values [SPLITS, T, Hq, D], lse [SPLITS, T, Hq]."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    split, kv_head = tl.program_id(0), tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # a row's last tokens have most to do
    row, first_tile = _find_row(query_start, num_rows, tile, BLOCK_Q)
    first_token = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - first_token
    first_query = (tile - first_tile) * BLOCK_Q
    if first_query >= num_queries:
        return
    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP
    real = (query < num_queries) & (m < BLOCK_Q * GROUP)
    pair = (first_token + query).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP
    result = split.to(tl.int64) * num_tokens * (KV_HEADS * GROUP) + pair

    context = tl.load(context_lens + row)
    first_position = context - num_queries + first_query
    end = tl.minimum(first_position + BLOCK_Q, context)  # of what the tile may see
    per_split = tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N
    first, last = split * per_split, tl.minimum((split + 1) * per_split, end)
    if first >= end:
        store_empty_split(lse, result, real, BLOCK_M)
        return
    seen_by_all = (first_position + 1) // BLOCK_N * BLOCK_N
    border = tl.maximum(first, tl.minimum(seen_by_all, last))
    dims = tl.arange(0, HEAD_DIM)
    q_tile = tl.load(q + pair[:, None] * HEAD_DIM + dims[None, :], mask=real[:, None], other=0)
    acc = empty_sum(BLOCK_M, HEAD_DIM, q.dtype.element_ty)
    total = tl.zeros([BLOCK_M], acc.dtype)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for masked in tl.static_range(2):
        acc, total, top = attend(
            q_tile,
            first_position + m // GROUP,
            acc,
            total,
            top,
            k_cache,
            v_cache,
            block_tables + row * table_width,
            kv_head,
            border if masked else first,
            last if masked else border,
            scale,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_N,
            STAGES,
            masked == 1,
        )
    store_split(acc, total, top, values, lse, result, real, HEAD_DIM, SPLITS)


def prefill_attention_triton(
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
    `max_query_len` is not needed: the grid is sized by tokens and rows."""
    (num_tokens, num_heads, head_dim), num_rows = q.shape, len(context_lens)
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    check_layout(q, k_cache, v_cache, block_tables)
    if takes(q, k_cache):
        where = k_cache, v_cache, block_tables, query_start, context_lens
        return prefill_attention_hopper(q, *where, scale)
    num_tiles, max_context = _num_tiles(q, kv_heads, num_rows), block_tables.shape[1] * block_size
    programs = num_programs(q, k_cache, num_rows)
    splits = num_splits(SPLIT_TABLE, programs, max_context, q.device)
    values, lse = split_buffers(out, splits)
    launch = _launch(q)
    _prefill_kernel[splits, kv_heads, num_tiles](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start,
        context_lens,
        values,
        lse,
        scale * LOG2_E,
        num_tokens,
        num_rows,
        block_tables.stride(0),
        GROUP=num_heads // kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        STAGES=launch["num_stages"],
        SPLITS=splits,
        **launch,
    )
    merge_splits(values, lse, query_start, out)
    return out


def _row_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One row: q [N, Hq, D], k, v [C, Hq, D], N <= C -> [N, Hq, D]."""
    num_queries, context = len(q), len(k)
    past = context - num_queries
    # With three dims torch would leave its fused kernels and write all scores to memory.
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # [1, Hq, N or C, D]
    if past == 0:  # torch's causal mask starts at the first key: right only without a past
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out[0].transpose(0, 1)
    chunk = max(1, MAX_MASK_ELEMENTS // context)
    outputs = []
    for first in range(0, num_queries, chunk):
        last = min(first + chunk, num_queries)
        visible = past + last  # keys that the chunk's last query token sees
        mask = torch.ones(last - first, visible, dtype=torch.bool, device=q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, :visible],
                v[:, :, :visible],
                attn_mask=mask.tril_(past + first),
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def prefill_attention_torch(
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
    [R] int32 = cached + query tokens. Rows without query tokens are passed over.
    `max_query_len`, the most query tokens of a row, is for kernels that are sized by it.
    """
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    bounds = query_start.tolist()
    for row, context in enumerate(context_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        if queries.start == queries.stop:
            continue
        blocks = block_tables[row, : -(-context // block_size)]
        # [C, Hq, D] each: not every fused kernel of torch takes grouped heads.
        k, v = (
            cache[blocks].flatten(0, 1)[:context].repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )
        out[queries] = _row_attention(q[queries], k, v, scale)
    return out


IMPLEMENTATIONS = {
    "prefill_attention": {"triton": prefill_attention_triton, "torch": prefill_attention_torch}
}
