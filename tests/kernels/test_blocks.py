"""Ops put together as a layer puts them, against the same layer of transformers."""

import pytest
import torch
from transformers import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as reference

from ernie_engine.kernels.rope import rope_table


@pytest.fixture
def config():
    return Ernie4_5_MoeConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        moe_intermediate_size=24,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=0,
        attn_implementation="eager",
    )


def at_most_fp32(dtype):
    """The precision of what the reference's router and RoPE take part in."""
    return torch.float32 if dtype == torch.float64 else dtype


def randomize(module, dtype=torch.float32):
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.1).to(dtype)
    return module.requires_grad_(False)


def test_rms_norm_has_the_bits_of_transformers(config, ops, device, dtype, randn):
    module = randomize(reference.Ernie4_5_MoeRMSNorm(64, 1e-5), dtype)
    x = randn(5, 64)
    expected = module.to(device)(x)
    tight = 0 if dtype.itemsize == 2 else 1e-6
    y = ops.rms_norm(x, module.weight, 1e-5)
    torch.testing.assert_close(y, expected, rtol=tight, atol=tight)


def test_dense_mlp(config, ops, device, dtype, randn, assert_near):
    module = randomize(reference.Ernie4_5_MoeMLP(config), dtype)
    x, weights = randn(5, 64), {k: w.to(device) for k, w in module.named_parameters()}
    gate_up = torch.cat((weights["gate_proj.weight"], weights["up_proj.weight"]))
    y = ops.linear(ops.swiglu(ops.linear(x, gate_up)), weights["down_proj.weight"])
    assert_near(y, module.double()(x.cpu().double()), factor=2)


def test_router_and_experts(config, ops, device, dtype, randn, assert_near):
    block = randomize(reference.Ernie4_5_MoeSparseMoeBlock(config))
    block.gate.moe_statics.e_score_correction_bias.data = 20 + torch.rand(1, 8) * 0.05
    gate = block.gate.weight.data * 5
    block.gate.weight.data = gate
    experts = block.experts.to(dtype)
    x = randn(33, 64)
    bias = block.gate.moe_statics.e_score_correction_bias.view(-1)
    weights, ids = ops.router(x, gate.to(device), bias.to(device), 3, 1e-12)
    _, expected_weights, expected_ids = block.gate(x.cpu())
    assert torch.equal(ids.cpu(), expected_ids)
    assert_near(weights, expected_weights.double(), like=at_most_fp32(dtype), factor=4)
    y = ops.moe_experts(
        x, experts.gate_up_proj.to(device), experts.down_proj.to(device), weights, ids
    )
    expected = experts.double()(x.cpu().double(), expected_ids, weights.cpu().double())
    assert_near(y, expected, factor=2)


@pytest.mark.parametrize("split", [0, 1, 9, 16, 22])  # tokens cached before the last step
def test_attention(config, ops, device, dtype, randn, assert_near, split):
    module = randomize(reference.Ernie4_5_MoeAttention(config, 0), dtype)
    num_tokens, x = 23, randn(23, 64)
    qkv_weight = torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight])
    blocks = torch.tensor([[3, 0, 5, 1, 4, 2]], dtype=torch.int32)
    k_cache, v_cache = (torch.empty(6, 4, 2, 16, dtype=dtype, device=device) for _ in range(2))
    table = rope_table(num_tokens, 16, config.rope_parameters["rope_theta"], device)

    def step(start, stop, attention):
        positions = torch.arange(start, stop)
        slots = blocks[0].long()[positions // 4] * 4 + positions % 4
        qkv = ops.linear(x[start:stop], qkv_weight.to(device)).unflatten(-1, (-1, 16))
        q = ops.rope_and_cache(
            *qkv.split([4, 2, 2], dim=1),
            table,
            positions.to(device),
            k_cache,
            v_cache,
            slots.to(device),
        )
        lens = torch.tensor([0, stop - start, stop], dtype=torch.int32, device=device)
        y = attention(
            q, k_cache, v_cache, blocks.to(device), lens[:2], lens[2:], 0.25, stop - start
        )
        return ops.linear(y.flatten(1), module.o_proj.weight.to(device))

    outputs = [step(0, split, ops.prefill_attention)] if split else []
    last = ops.decode_attention if num_tokens - split <= 8 else ops.prefill_attention
    y = torch.cat([*outputs, step(split, num_tokens, last)])

    wide = x.cpu().double()[None]
    cos, sin = reference.Ernie4_5_MoeRotaryEmbedding(config)(wide, torch.arange(num_tokens)[None])
    mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=torch.float64).triu(1)
    expected, _ = module.double()(wide, (cos, sin), mask)
    assert_near(y, expected[0], like=at_most_fp32(dtype), factor=4)
