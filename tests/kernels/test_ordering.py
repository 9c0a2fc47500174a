"""Order keys and the noise inside kernels, alone: what sampling, routing and ranks stand on."""

import pytest
import torch
import triton
import triton.language as tl

from ernie_engine.kernels.ordering import key_ids, key_values, kth_largest, order_keys
from ernie_engine.kernels.philox import gumbel_noise, gumbel_noise_of


@triton.jit
def _keys_kernel(values, ids, keys, back_values, back_ids, N: tl.constexpr):
    at = tl.arange(0, N)
    found = order_keys(tl.load(values + at), tl.load(ids + at))
    tl.store(keys + at, found)
    tl.store(back_values + at, key_values(found))
    tl.store(back_ids + at, key_ids(found))


@triton.jit
def _kth_kernel(values, k, out, N: tl.constexpr):
    tl.store(out, kth_largest(tl.load(values + tl.arange(0, N)), k))


@triton.jit
def _noise_kernel(seeds, positions, noise, first_token, N: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, N)
    found = gumbel_noise_of(at + first_token, tl.load(positions + row), tl.load(seeds + row))
    tl.store(noise + row * N + at, found)


def test_keys_sort_by_value_then_by_id(kernel_device):
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.5, -3.5, 3e38, -3e38])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf]), torch.randn(6)]).repeat(2)
    ids = torch.randperm(1 << 20)[:32]
    ids[:2] = torch.tensor([0, (1 << 20) - 1])
    keys, back_ids = (torch.empty(32, dtype=torch.int64, device=kernel_device) for _ in range(2))
    back_values = torch.empty(32, device=kernel_device)
    arguments = values.to(kernel_device), ids.to(kernel_device), keys, back_values, back_ids
    _keys_kernel[(1,)](*arguments, N=32)
    assert torch.equal(back_values.cpu(), values)
    assert torch.equal(back_ids.cpu(), ids)
    pairs = list(zip(values.tolist(), ids.tolist(), strict=True))
    expected = sorted(range(32), key=lambda i: (-pairs[i][0], pairs[i][1]))
    assert keys.cpu().argsort(descending=True).tolist() == expected
    assert keys.unique().numel() == 32


@pytest.mark.parametrize("k", [1, 2, 17, 31, 32])
def test_kth_largest(kernel_device, k):
    values = torch.randn(32)
    values[5:9], values[20:] = values[5].item(), -torch.inf
    out = torch.empty(1, device=kernel_device)
    _kth_kernel[(1,)](values.to(kernel_device), k, out, N=32)
    assert out.item() == values.sort(descending=True).values[k - 1]


def test_noise_is_the_twins(kernel_device):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 5 << 32])
    positions = torch.tensor([0, 131071, 2**40 + 3, 7, 2**31, 2**32 - 1])
    noise = torch.empty(6, 256, device=kernel_device)
    _noise_kernel[(6,)](seeds.to(kernel_device), positions.to(kernel_device), noise, 103000, N=256)
    twin = gumbel_noise(seeds, positions, 256, first_token=103000)
    # fp64 logarithms may be one unit apart; in fp32 that shows once in 2^28 or so.
    assert torch.equal(noise.cpu(), twin)
