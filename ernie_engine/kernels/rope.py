"""Rotary position embedding over interleaved pairs, and the write into the paged K/V cache.

With angle = position * theta^(-2i/D) for the pair i of a head:

    out[2i]     = x[2i] cos(angle) - x[2i+1] sin(angle)
    out[2i + 1] = x[2i+1] cos(angle) + x[2i] sin(angle)

in fp32, rounded once. The pairs are neighbours over the whole head (GPT-J's way, not NeoX's
halves). Angles are fp32 products and must stay so: at far positions the reference is off from
the true angle by its own rounding, and a better angle would be another model.
"""

import torch
from torch import Tensor


def rope_table(max_len: int, head_dim: int, theta: float, device: torch.device | str) -> Tensor:
    """cos and sin of every position: [max_len, head_dim] fp32, first half cos, second half sin.

    Computed on the CPU whatever the device, so that all devices rotate by the same bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (theta**exponents)  # [D / 2]
    angles = torch.arange(max_len, dtype=torch.float32, device="cpu")[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


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


IMPLEMENTATIONS = {"rope_and_cache": {"torch": rope_and_cache_torch}}
