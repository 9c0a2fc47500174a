"""The way into attention in one launch: residual add, RMSNorm, QKV product, RoPE, cache write.

    h = residual + x;  q, k, v = split(norm(h) @ qkv.T);  q, k rotated;  k, v into the cache

Each rounding is that of the parts (add_rms_norm, linear, rope_and_cache), but for the rotation's
two products, whose sum is rounded once. Their composition is the twin, and what runs for more
tokens than the kernel takes.

Each program holds some rows of one head and norms every token for itself: a norm reads 10 kB that
lie in the L2 cache and takes a launch and a wait away.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.gemv import (
    MOST_TOKENS,
    dot_rows,
    load_rows,
    load_vector,
    normed_vector,
)
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.parts import TORCH, TRITON, Parts

# By hidden size. BLOCK_N: rows of a program, a divisor of the head's size.
TABLE = {
    (DEFAULT, 1024): {"BLOCK_N": 16, "num_warps": 4},
    (DEFAULT, 4096): {"BLOCK_N": 8, "num_warps": 8},
    (DEFAULT, 8192): {"BLOCK_N": 4, "num_warps": 8},
    ("sm_90", 1024): {"BLOCK_N": 4, "num_warps": 2},
    ("sm_90", 2560): {"BLOCK_N": 8, "num_warps": 4},
    ("sm_90", 8192): {"BLOCK_N": 2, "num_warps": 8},
}
CANDIDATES = [
    {"BLOCK_N": rows, "num_warps": warps} for rows in (2, 4, 8, 16) for warps in (2, 4, 8)
]
# By tokens: 1 = the one launch.
FEW = {
    (DEFAULT, 4): {"FEW": 1},
    (DEFAULT, 5): {"FEW": 0},
    ("sm_90", 2): {"FEW": 1},
    ("sm_90", 8): {"FEW": 0},
}
FEW_CANDIDATES = [{"FEW": 1}, {"FEW": 0}]


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_qkv_rope_kernel(
    x,
    residual,
    norm,
    weight,
    table,
    positions,
    slots,
    total,
    q,
    k_cache,
    v_cache,
    eps,
    num_tokens,
    HAS_RESIDUAL: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    rows = load_rows(weight, first + tl.arange(0, BLOCK_N), (HEADS + 2 * KV_HEADS) * DIM, K, WIDTH)
    norm_weight = load_vector(norm, K, WIDTH)
    head, dim = first // DIM, first % DIM
    pair = dim // 2 + tl.arange(0, BLOCK_N // 2)
    wait_for_inputs(PDL)
    for token in tl.range(0, num_tokens):
        # What the end of this round needs is on its way before the long wait for x.
        angles = table + tl.load(positions + token) * DIM + pair
        cos, sin = tl.load(angles), tl.load(angles + DIM // 2)
        slot = tl.load(slots + token) * (KV_HEADS * DIM) + dim
        at = token * K
        y = normed_vector(
            x + at,
            residual + at,
            norm_weight,
            total + at,
            eps,
            first == 0,
            HAS_RESIDUAL,
            K,
            WIDTH,
        )
        value = dot_rows(rows, y).to(x.dtype.element_ty)
        if head < HEADS + KV_HEADS:
            even, odd = tl.split(tl.reshape(value.to(tl.float32), [BLOCK_N // 2, 2]))
            turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
            value = tl.reshape(turned, [BLOCK_N]).to(value.dtype)
        if head < HEADS:
            to = q + token * (HEADS * DIM) + first
        else:
            if head < HEADS + KV_HEADS:
                to = k_cache + slot + (head - HEADS) * DIM
            else:
                to = v_cache + slot + (head - HEADS - KV_HEADS) * DIM
        tl.store(to + tl.arange(0, BLOCK_N), value)


def norm_qkv_rope_few(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """As composed(), in one launch; all tensors contiguous, D a power of two, up to MOST_TOKENS."""
    (num_tokens, hidden), (kv_heads, dim) = x.shape, k_cache.shape[2:]
    heads = len(weight) // dim - 2 * kv_heads
    tensors = x, norm, weight, rope_table, positions, k_cache, v_cache, cache_slots
    assert all(t.is_contiguous() for t in tensors) and 0 < num_tokens <= MOST_TOKENS
    q, total = x.new_empty(num_tokens, heads, dim), x
    if residual is not None:
        assert residual.is_contiguous()
        total = torch.empty_like(x)
    launch = pick(TABLE, x.device, hidden)
    assert dim % launch["BLOCK_N"] == 0, "a program's rows lie in one head"
    _norm_qkv_rope_kernel[(len(weight) // launch["BLOCK_N"],)](
        *(x, x if residual is None else residual, norm, weight),
        *(rope_table, positions, cache_slots, total, q, k_cache, v_cache, eps, num_tokens),
        HAS_RESIDUAL=residual is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        K=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        **launch,
        **overlap(x.device),
    )
    return q, total


def composed(
    parts: Parts,
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H] (None: x is the stream itself), norm [H], weight [(Hq + 2 Hkv) D, H],
    the rest as rope_and_cache takes it -> the rotated q [T, Hq, D] and residual + x [T, H]."""
    y, total = parts.norm(x, residual, norm, eps)
    kv_heads, dim = k_cache.shape[2:]
    qkv = parts.linear(y, weight).unflatten(-1, (-1, dim))
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q = parts.rope_and_cache(q, k, v, rope_table, positions, k_cache, v_cache, cache_slots)
    return q, total


def norm_qkv_rope_triton(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the twin, all tensors contiguous."""
    few = len(x) and pick(FEW, x.device, len(x))["FEW"]
    run = norm_qkv_rope_few if few else partial(composed, TRITON)
    where = rope_table, positions, k_cache, v_cache, cache_slots
    return run(x, residual, norm, eps, weight, *where)


norm_qkv_rope_torch = partial(composed, TORCH)
IMPLEMENTATIONS = {"norm_qkv_rope": {"triton": norm_qkv_rope_triton, "torch": norm_qkv_rope_torch}}
