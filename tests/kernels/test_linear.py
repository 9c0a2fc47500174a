"""The two dense products: a linear layer and the vocabulary head."""

import pytest
import torch

SHAPES = [(0, 5, 3), (1, 1, 1), (1, 64, 7), (5, 33, 129), (17, 130, 31)]


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_linear(linear, randn, assert_near, rows, inner, columns):
    x, weight = randn(rows, inner), randn(columns, inner)
    y = linear(x, weight)
    assert y.dtype == x.dtype
    assert_near(y, x.cpu().double() @ weight.cpu().double().T)


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_vocab_head(vocab_head, dtype, randn, assert_near, rows, inner, columns):
    x, weight = randn(rows, inner), randn(columns, inner)
    logits = vocab_head(x, weight)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(logits, x.cpu().double() @ weight.cpu().double().T, like=dtype)


def test_head_rounds_the_product_before_widening(vocab_head, dtype, randn):
    logits = vocab_head(randn(3, 64), randn(9, 64))
    assert torch.equal(logits, logits.to(dtype).to(logits.dtype))
