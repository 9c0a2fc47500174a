"""The two dense products: a linear layer and the vocabulary head."""

import pytest
import torch
import torch.nn.functional as F

from ernie_engine.kernels import launch
from ernie_engine.kernels import linear as module
from ernie_engine.kernels.linear import linear_triton, num_splits, small_linear
from tests.kernels.tile_check import assert_as_near_as_twin, half_and_single, where_kernels_run

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


def make(rows, inner, columns, dtype):
    device = where_kernels_run()
    return torch.randn(rows, inner).to(device, dtype), torch.randn(columns, inner).to(device, dtype)


def check(product, x, weight):
    exact = F.linear(x.double(), weight.double())
    assert_as_near_as_twin(product(x, weight), F.linear(x, weight), exact)


# On both sides of the tiles' borders; K in one part, and in several with an uneven last one.
@half_and_single
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 64])
@pytest.mark.parametrize(("inner", "columns"), [(64, 32), (100, 65), (600, 33), (1100, 31)])
def test_small_product(dtype, rows, inner, columns):
    check(small_linear, *make(rows, inner, columns, dtype))


def test_the_cases_of_small_product_split_and_do_not():
    splits = [num_splits(columns, inner) for inner, columns in [(100, 65), (600, 33), (1100, 31)]]
    assert splits == [1, 2, 4]


def test_splits_fill_a_card_and_leave_large_weights_whole():
    assert num_splits(24576, 2560) == 1  # 768 programs as it is
    assert num_splits(2560, 2560) == 2
    assert num_splits(1280, 8192) == 4
    assert num_splits(64, 512) == 2 and num_splits(64, 511) == 1  # a part keeps 256 columns
    assert num_splits(1, 1) == 1


@pytest.mark.parametrize(
    ("rows", "way"), [(2, "rows"), (3, "tiles"), (64, "tiles"), (65, "library"), (9000, "library")]
)
def test_the_way_is_chosen_by_the_number_of_tokens(monkeypatch, rows, way):
    calls = []
    for name, where, attribute in (
        ("rows", module, "few_linear"),
        ("tiles", module, "small_linear"),
        ("library", F, "linear"),
    ):
        monkeypatch.setattr(where, attribute, lambda x, weight, name=name: calls.append(name))
    linear_triton(torch.zeros(rows, 8), torch.zeros(3, 8))
    assert calls == [way]


def test_another_card_may_have_another_border(monkeypatch):
    monkeypatch.setitem(module.LIBRARY, ("sm_12", 16), {"LIBRARY": 1})
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_12")
    monkeypatch.setattr(F, "linear", lambda x, weight: "library")
    assert linear_triton(torch.zeros(3, 8), torch.zeros(3, 8)) == "library"


@pytest.mark.parametrize(("inner", "columns"), [(64, 70), (1100, 70)])
def test_planted_errors_are_found(inner, columns):
    x, weight = make(40, inner, columns, torch.float16)

    def one_percent_in_a_tile(x, weight):
        y = small_linear(x, weight)
        y[16:32, 32:64] *= 1.01
        return y

    def unwritten_row(x, weight):
        y = small_linear(x, weight)
        y[39] = torch.empty_like(y[39])
        return y

    check(small_linear, x, weight)
    for wrong in (one_percent_in_a_tile, unwritten_row):
        with pytest.raises(AssertionError):
            check(wrong, x, weight)
