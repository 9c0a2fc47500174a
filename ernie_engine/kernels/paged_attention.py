"""What prefill and decode attention share: one tile of queries against a range of paged keys.

Owns the running softmax and the read through the block table. A tile's rows are (query token,
head of the group) pairs that share one K/V head, so that a key is read once for all of them.
Never reads a slot at or after `last`, and never decides what a program works on.
"""

# pyright: reportGeneralTypeIssues=false
# (a kernel's loops are not Python's)

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # the softmax runs on powers of two: callers scale by this as well


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
    MASKED: tl.constexpr,
):
    """Takes keys first .. last - 1 of a row into (acc [M, D], total [M], top [M]), all fp32.

    q [M, D] in the cache's dtype, positions [M] of its tokens, table: the row's block ids. top is
    the maximum of scale * q.k, total the sum of 2^(scale * q.k - top), acc that of the same times
    v; they start as -inf, 0 and 0. Without MASKED all keys must be visible to all rows of q and
    last - first be a multiple of BLOCK_N.
    """
    dims = tl.arange(0, HEAD_DIM)
    for start in tl.range(first, last, BLOCK_N):
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
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        top = new_top
    return acc, total, top
