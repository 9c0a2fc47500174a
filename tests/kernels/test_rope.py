import math

import pytest
import torch
from transformers import Ernie4_5Config
from transformers.models.ernie4_5.modeling_ernie4_5 import (
    Ernie4_5RotaryEmbedding,
    apply_rotary_pos_emb,
)

from ernie_engine.kernels.rope import rope_table

THETA = 500000.0
POSITIONS = [0, 1, 2, 63, 1000, 4097, 131071]


def reference_embedding(head_dim):
    parameters = {"rope_type": "default", "rope_theta": THETA}
    return Ernie4_5RotaryEmbedding(Ernie4_5Config(head_dim=head_dim, rope_parameters=parameters))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_table_has_the_bits_of_transformers(head_dim):
    table = rope_table(131072, head_dim, THETA, "cpu")
    assert table.dtype == torch.float32
    assert table.shape == (131072, head_dim)
    positions = torch.tensor([POSITIONS])
    cos, sin = reference_embedding(head_dim)(torch.zeros(1), positions)
    half = head_dim // 2
    assert torch.equal(table[positions[0]], torch.cat((cos[0, :, :half], sin[0, :, :half]), -1))


def test_table_keeps_the_rounding_of_fp32_angles():
    angles = [131071 * THETA ** (-2 * i / 128) for i in range(64)]  # fp64
    table = rope_table(131072, 128, THETA, "cpu")[131071]
    error = (table[:64] - torch.tensor([math.cos(a) for a in angles])).abs().max()
    assert 1e-4 < error < 2e-2  # a table from fp64 angles would be nearer


def make_cache(num_blocks, block_size, k):
    shape = (num_blocks, block_size, *k.shape[1:])
    return (torch.full(shape, -7.0, dtype=k.dtype, device=k.device) for _ in range(2))


def naive_rotate(x, positions, table):  # fp64, pair by pair
    out = x.cpu().double().clone()
    half = x.shape[-1] // 2
    for t, position in enumerate(positions):
        for i in range(half):
            c, s = table[position, i].item(), table[position, half + i].item()
            a, b = x[t, :, 2 * i].cpu().double(), x[t, :, 2 * i + 1].cpu().double()
            out[t, :, 2 * i], out[t, :, 2 * i + 1] = a * c - b * s, b * c + a * s
    return out


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (6, 3)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rope_and_cache(
    rope_and_cache, device, dtype, randn, assert_near, heads, head_dim, num_tokens
):
    num_heads, num_kv_heads = heads
    qkv = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    untouched = qkv.clone()
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    assert num_tokens < 2 or not q.is_contiguous()
    k_cache, v_cache = make_cache(5, 3, k)
    positions = [11, 0, 40, 3, 3, 12, 39][:num_tokens]
    slots = [14, 0, 7, 2, 3, 9, 8][:num_tokens]
    table = rope_table(41, head_dim, THETA, "cpu")
    y = rope_and_cache(
        q,
        k,
        v,
        table.to(device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        k_cache,
        v_cache,
        torch.tensor(slots, dtype=torch.int64, device=device),
    )
    assert y.dtype == dtype
    assert_near(y, naive_rotate(q, positions, table))
    assert torch.equal(qkv, untouched)
    cached_k, cached_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    assert_near(cached_k[slots], naive_rotate(k, positions, table))
    assert torch.equal(cached_v[slots], v)
    others = [slot for slot in range(15) if slot not in slots]
    assert (cached_k[others] == -7).all()
    assert (cached_v[others] == -7).all()


def test_bits_of_transformers(rope_and_cache, device, dtype, randn):
    num_tokens = len(POSITIONS)
    q, k, v = randn(num_tokens, 4, 128), randn(num_tokens, 2, 128), randn(num_tokens, 2, 128)
    k_cache, v_cache = make_cache(4, 2, k)
    positions = torch.tensor(POSITIONS, device=device)
    table = rope_table(131072, 128, THETA, device)
    slots = torch.arange(num_tokens, device=device)
    y = rope_and_cache(q, k, v, table, positions, k_cache, v_cache, slots)
    cos, sin = reference_embedding(128)(torch.zeros(1), positions.cpu()[None])
    ref_q, ref_k = apply_rotary_pos_emb(
        q.cpu().transpose(0, 1)[None], k.cpu().transpose(0, 1)[None], cos, sin
    )
    tight = 0 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(y.cpu(), ref_q[0].transpose(0, 1), rtol=tight, atol=tight)
    cached = k_cache.flatten(0, 1)[:num_tokens].cpu()
    torch.testing.assert_close(cached, ref_k[0].transpose(0, 1), rtol=tight, atol=tight)
