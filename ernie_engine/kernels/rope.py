"""Rotary position embedding over interleaved pairs, and the write into the paged K/V cache.

With angle = position * theta^(-2i/D) for the pair i of a head:

    out[2i]     = x[2i] cos(angle) - x[2i+1] sin(angle)
    out[2i + 1] = x[2i+1] cos(angle) + x[2i] sin(angle)

in fp32, rounded once. The pairs are neighbours over the whole head (GPT-J's way, not NeoX's
halves). Angles are fp32 products and must stay so: at far positions the reference is off from
the true angle by its own rounding, and a better angle would be another model.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs

# By the number of tokens; HEADS of q, or of k and v, to a program.
TABLE = {
    (DEFAULT, 64): {"HEADS": 1, "num_warps": 1},
    (DEFAULT, 1024): {"HEADS": 4, "num_warps": 2},
    (DEFAULT, 16384): {"HEADS": 8, "num_warps": 4},
    ("sm_90", 1): {"HEADS": 4, "num_warps": 4},
    ("sm_90", 1024): {"HEADS": 4, "num_warps": 2},
    ("sm_90", 16384): {"HEADS": 16, "num_warps": 2},
}
CANDIDATES = [
    {"HEADS": heads, "num_warps": warps} for heads in (1, 2, 4, 8, 16) for warps in (1, 2, 4)
]


def rope_table(max_len: int, head_dim: int, theta: float, device: torch.device | str) -> Tensor:
    """cos and sin of every position: [max_len, head_dim] fp32, first half cos, second half sin.

    Computed on the CPU whatever the device, so that all devices rotate by the same bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (theta**exponents)  # [D / 2]
    angles = torch.arange(max_len, dtype=torch.float32, device="cpu")[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


@triton.jit
def _rotated(x, cos, sin, HEADS: tl.constexpr, DIM: tl.constexpr):
    """x [HEADS, DIM], cos, sin [DIM / 2] fp32 -> [HEADS, DIM] fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [HEADS, DIM // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, DIM])


@triton.jit
def _rope_and_cache_kernel(
    q,
    k,
    v,
    table,
    positions,
    slots,
    out,
    k_cache,
    v_cache,
    q_token,  # strides of q, k, v
    q_head,
    q_dim,
    k_token,
    k_head,
    k_dim,
    v_token,
    v_head,
    v_dim,
    num_heads,
    num_kv_heads,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has some heads of q, or some of k and v, of one token."""
    wait_for_inputs(PDL)
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, half = tl.arange(0, DIM)[None, :], tl.arange(0, DIM // 2)
    angles = table + tl.load(positions + token) * DIM + half
    cos, sin = tl.load(angles), tl.load(angles + DIM // 2)
    num_q_tiles = tl.cdiv(num_heads, HEADS)
    if tile < num_q_tiles:
        heads = tile * HEADS + tl.arange(0, HEADS)[:, None]
        inside = heads < num_heads
        x = tl.load(q + token * q_token + heads * q_head + dims * q_dim, mask=inside)
        out_at = (token * num_heads + heads) * DIM + dims
        tl.store(out + out_at, _rotated(x, cos, sin, HEADS, DIM), mask=inside)
    else:
        heads = (tile - num_q_tiles) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = heads < num_kv_heads
        x = tl.load(k + token * k_token + heads * k_head + dims * k_dim, mask=inside)
        value = tl.load(v + token * v_token + heads * v_head + dims * v_dim, mask=inside)
        slot_at = (tl.load(slots + token) * num_kv_heads + heads) * DIM + dims
        tl.store(k_cache + slot_at, _rotated(x, cos, sin, HEADS, DIM), mask=inside)
        tl.store(v_cache + slot_at, value, mask=inside)


def rope_and_cache_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> Tensor:
    """As rope_and_cache_torch; D a power of two. Bits equal to the twin's: nothing is fused."""
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and rope_table.is_contiguous()
    assert positions.is_contiguous() and cache_slots.is_contiguous()
    out = torch.empty(num_tokens, num_heads, dim, dtype=q.dtype, device=q.device)
    options = pick(TABLE, q.device, num_tokens)
    tiles = sum(triton.cdiv(heads, options["HEADS"]) for heads in (num_heads, num_kv_heads))
    _rope_and_cache_kernel[(num_tokens, tiles)](
        *(q, k, v, rope_table, positions, cache_slots, out, k_cache, v_cache),
        *(*q.stride(), *k.stride(), *v.stride(), num_heads, num_kv_heads),
        DIM=dim,
        enable_fp_fusion=False,
        **options,
        **overlap(q.device),
    )
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos, sin [T, 1, D / 2] -> [T, heads, D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(dim=-1)  # [T, heads, D / 2] each
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def rope_and_cache_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> Tensor:
    """Rotates q and k; stores the rotated k and v as it is; returns the rotated q [T, Hq, D].

    q [T, Hq, D], k, v [T, Hkv, D]: any strides, such as views of one product. rope_table
    [L, D] fp32 as `rope_table` makes it, positions [T] int64 < L. k_cache, v_cache
    [num_blocks, block_size, Hkv, D], written in place at cache_slots [T] int64 =
    block * block_size + offset, all distinct.
    """
    cos, sin = rope_table[positions][:, None].chunk(2, dim=-1)  # [T, 1, D / 2] each
    slot_shape = (-1, *k_cache.shape[2:])
    k_cache.view(slot_shape).index_copy_(0, cache_slots, _rotate(k, cos, sin))
    v_cache.view(slot_shape).index_copy_(0, cache_slots, v)
    return _rotate(q, cos, sin)


IMPLEMENTATIONS = {
    "rope_and_cache": {"triton": rope_and_cache_triton, "torch": rope_and_cache_torch}
}
