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


def test_norm_is_of_the_rounded_sum(add_rms_norm, device):
    # 256 + 1 is 256 in bf16 (ties to even): the norm of (256, 0) has no trace of the 1.
    residual = torch.tensor([[256.0, 0.0]], dtype=torch.bfloat16, device=device)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, device=device)
    weight = torch.ones(2, dtype=torch.bfloat16, device=device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert total.tolist() == [[256.0, 0.0]]
    assert y.float().tolist() == [[1.4140625, 0.0]]


def test_quotient_is_rounded_before_the_weight(rms_norm, device):
    # The row (1024, 0) has the quotient sqrt(2); some weights tell one rounding from two.
    quotient = torch.tensor(2.0).sqrt()
    weights = torch.arange(1.0, 2.0, 2**-7).bfloat16()
    twice = quotient.bfloat16() * weights
    once = (quotient * weights.float()).bfloat16()
    assert (twice != once).any()
    x = torch.zeros(len(weights), 2, dtype=torch.bfloat16, device=device)
    x[:, 0] = 1024.0
    for row, weight, expected in zip(x, weights.to(device), twice, strict=True):
        y = rms_norm(row[None], torch.stack((weight, weight)), EPS)
        assert y[0, 0].cpu() == expected
