"""What prefill and decode attention share: one tile of queries against a range of paged keys.

Owns the running softmax over keys read through the block table, and how a context that was split
comes together: each range leaves its normalised values and the logarithm of its softmax's
denominator, to be weighed in order, by a second launch (below) or the last program of a row. A
tile's rows are (query token, head) pairs that share one K/V head: a key is read once for all. Never
reads a slot at or after `last`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for;
# a kernel's loops are not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import Table, pick
from ernie_engine.kernels.products import add_product

LOG2_E = 1.4426950408889634  # the softmax runs on powers of two: callers scale by this as well
MERGED_AT_ONCE = 16  # splits; with one warp a thread holds their values in registers
# What differs from step to step, views of larger tensors among it, makes no kernel of its own.
STEP_ARGUMENTS = [
    *("block_tables", "query_start", "context_lens"),
    *("num_tokens", "num_rows", "table_width"),
]


def check_layout(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor) -> None:
    """The kernels compute addresses from sizes."""
    assert q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert block_tables.stride(1) == 1 or block_tables.shape[1] == 1


@triton.jit
def _load_if(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def attend(
    q,
    positions,
    acc,
    total,
    top,
    k_cache,
    v_cache,
    table,
    kv_head,
    first,
    last,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes keys first .. last - 1 of a row into (acc [M, D], total [M], top [M]).

    q [M, D] in the cache's dtype, positions [M] of its tokens, table: the row's block ids. top is
    the maximum of scale * q.k, total the sum of 2^(scale * q.k - top), acc that of the same times
    v; they start as -inf, 0 and 0, acc and total as sums that products.py tells of. Without MASKED
    all keys must be visible to all rows of q and last - first be a multiple of BLOCK_N.
    """
    dims = tl.arange(0, HEAD_DIM)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < last
        blocks = _load_if(table + keys // BLOCK_SIZE, inside, MASKED)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        where = (slots * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        k = _load_if(k_cache + where, inside[:, None], MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        if MASKED:
            visible = inside[None, :] & (keys[None, :] <= positions[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = new_top
        if MASKED:  # a row that has seen no key yet must not compute -inf - -inf
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale - shift[:, None])
        keep = tl.exp2(top - shift)
        v = _load_if(v_cache + where, inside[:, None], MASKED)
        acc = add_product(p.to(v.dtype), v, acc * keep[:, None])
        total = total * keep + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit
def store_split(
    acc,
    total,
    top,
    values,
    lse,
    result,
    real,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What attend() gave for the rows `real`, as rows `result` [M] of values and lse."""
    # A query token may see nothing of its context's last range: 0 / 0 must not be.
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    places = values + result[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(places, acc.to(values.dtype.element_ty), mask=real[:, None])
    if SPLITS > 1:
        tl.store(lse + result, top + tl.log2(total), mask=real)


@triton.jit
def store_empty_split(lse, result, real, BLOCK_M: tl.constexpr):
    """A range behind the context: no values, which nobody will read."""
    tl.store(lse + result, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real)


@triton.jit(do_not_specialize=["query_start", "num_tokens", "num_rows"])
def _merge_kernel(
    values,
    lse,
    query_start,
    out,
    num_tokens,
    num_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One token and head: out = sum_s 2^(lse[s] - max lse) values[s] / sum_s 2^(...)."""
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(query_start + num_rows):  # padding: no program left values for it
        return
    pair = token.to(tl.int64) * HEADS + head
    stride = num_tokens.to(tl.int64) * HEADS
    top = tl.max(tl.load(lse + tl.arange(0, SPLITS) * stride + pair), 0)
    dims = tl.arange(0, HEAD_DIM)
    acc, total = tl.zeros([HEAD_DIM], tl.float32), 0.0
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        results = (start + tl.arange(0, AT_ONCE)) * stride + pair
        parts = tl.load(lse + results)
        weights = tl.exp2(parts - top)
        # An empty range has written no values: what stands there may be NaN.
        filled = parts > float("-inf")
        tile = values + results[:, None] * HEAD_DIM + dims[None, :]
        acc += tl.sum(weights[:, None] * tl.load(tile, mask=filled[:, None], other=0.0), 0)
        total += tl.sum(weights, 0)
    tl.store(out + pair * HEAD_DIM + dims, (acc / total).to(out.dtype.element_ty))


def num_splits(table: Table, num_programs: int, max_context: int, device: torch.device) -> int:
    """By the number of programs before keys are split, but with MIN_KEYS left for each part."""
    row = pick(table, device, num_programs)
    splits = row["SPLITS"]
    while splits > 1 and splits * row["MIN_KEYS"] > max_context:
        splits //= 2
    return splits


def split_buffers(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where store_split() writes: values [splits, T, Hq, D], lse [splits, T, Hq]."""
    lse = torch.empty(splits, *out.shape[:2], dtype=torch.float32, device=out.device)
    if splits == 1:  # the values are the result, and nobody asks for lse
        return out, lse
    return torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device), lse


def merge_splits(values: Tensor, lse: Tensor, query_start: Tensor, out: Tensor) -> None:
    """Buffers of split_buffers(), filled -> out [T, Hq, D]."""
    splits, (num_tokens, num_heads, head_dim) = len(lse), out.shape
    if splits == 1:
        return
    _merge_kernel[num_tokens, num_heads](
        *(values, lse, query_start, out, num_tokens, len(query_start) - 1),
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        AT_ONCE=min(splits, MERGED_AT_ONCE),
        num_warps=1,
    )
