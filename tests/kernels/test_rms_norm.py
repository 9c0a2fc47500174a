import pytest
import torch

EPS = 1e-5
SHAPES = [(0, 8), (1, 1), (1, 1024), (3, 7), (5, 257)]


def naive(x, weight):  # fp64, row by row
    x, weight = x.cpu().double(), weight.cpu().double()
    rows = [row * weight / (row.pow(2).mean() + EPS) ** 0.5 for row in x]
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])  # small rows show eps
def test_rms_norm(rms_norm, randn, assert_near, shape, scale):
    x, weight = randn(*shape) * scale, randn(shape[1])
    y = rms_norm(x, weight, EPS)
    assert y.dtype == x.dtype
    assert_near(y, naive(x, weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(add_rms_norm, randn, assert_near, shape):
    x, residual, weight = randn(*shape), randn(*shape) * 3, randn(shape[1])
    before = x.clone(), residual.clone()
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, before[0] + before[1])
    assert_near(y, naive(total, weight))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_norm_is_of_the_rounded_sum(add_rms_norm, device, half):
    # 256 + 1 is 256 in bf16 (ties to even), 2048 + 1 is 2048 in fp16: no trace of the 1 is normed.
    large = 2 / torch.finfo(half).eps
    residual = torch.tensor([[large, 0.0]], dtype=half, device=device)
    x = torch.tensor([[1.0, 0.0]], dtype=half, device=device)
    weight = torch.ones(2, dtype=half, device=device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert total.tolist() == [[large, 0.0]]
    assert y.tolist() == [[torch.tensor(2.0, dtype=half).sqrt().item(), 0.0]]


def test_quotient_is_rounded_before_the_weight(rms_norm, device, half):
    # The row (1024, 0) has the quotient sqrt(2); some weights tell one rounding from two.
    quotient = torch.tensor(2.0).sqrt()
    weights = torch.arange(1.0, 2.0, 2**-7).to(half)
    twice = quotient.to(half) * weights
    once = (quotient * weights.float()).to(half)
    assert (twice != once).any()
    x = torch.zeros(2, 2 * len(weights), dtype=half, device=device)
    x[:, ::2] = 1024.0  # every pair of columns has this quotient, so the row has it too
    y = rms_norm(x, weights.to(device).repeat_interleave(2), EPS)
    assert torch.equal(y[0, ::2].cpu(), twice)
