"""Fusions against the composition of twins: one launch, and what runs for more tokens."""

from functools import partial

import pytest
import torch

from ernie_engine.kernels import norm_qkv_rope as qkv_module
from ernie_engine.kernels import norm_router as router_module
from ernie_engine.kernels import norm_swiglu as mlp_module
from ernie_engine.kernels import tickets
from ernie_engine.kernels.gemv import MOST_TOKENS
from ernie_engine.kernels.norm_qkv_rope import composed as composed_qkv
from ernie_engine.kernels.norm_swiglu import composed as composed_mlp
from ernie_engine.kernels.parts import TORCH
from ernie_engine.kernels.rope import rope_table
from tests.kernels.tile_check import assert_as_near_as_twin, half_and_single, where_kernels_run

EPS, NORM_MIN = 1e-5, 1e-12
SIZES = [(1, 64), (2, 100), (3, 72), (MOST_TOKENS, 64), (20, 72)]  # tokens, hidden size


def make_qkv(num_tokens, hidden, heads, kv_heads, dim, dtype):
    device = where_kernels_run()
    x, residual = (torch.randn(num_tokens, hidden).to(device, dtype) for _ in range(2))
    norm = (1 + torch.randn(hidden) / 8).to(device, dtype)
    weight = (torch.randn((heads + 2 * kv_heads) * dim, hidden) / hidden**0.5).to(device, dtype)
    slots = torch.randperm(4 * 16)[:num_tokens].to(device)
    positions = torch.randint(0, 500, (num_tokens,)).to(device)
    table = rope_table(500, dim, 500000.0, device)
    caches = [torch.zeros(4, 16, kv_heads, dim).to(device, dtype) for _ in range(2)]
    return [x, residual, norm, EPS, weight, table, positions, *caches, slots]


def run_qkv(function, case, dtype=None):
    """q, the stream, what was written to both caches."""
    wide = [
        a.to(dtype, copy=True) if torch.is_tensor(a) and a.is_floating_point() else a for a in case
    ]
    q, total = function(*wide)
    slots = wide[9]
    return q, total, *(cache.flatten(0, 1)[slots] for cache in wide[7:9])


def check_qkv(function, case):
    twin = qkv_module.norm_qkv_rope_torch
    dtype = case[0].dtype
    ours, theirs, exact = (
        run_qkv(f, case, d) for f, d in ((function, dtype), (twin, dtype), (twin, torch.float64))
    )
    for out, like, reference in zip(ours, theirs, exact, strict=True):
        assert_as_near_as_twin(out.flatten(1), like.flatten(1), reference.flatten(1))


@half_and_single
@pytest.mark.parametrize("heads", [(2, 1, 64), (6, 2, 128), (1, 1, 16)])
@pytest.mark.parametrize(("num_tokens", "hidden"), SIZES)
def test_norm_qkv_rope(dtype, num_tokens, hidden, heads):
    case = make_qkv(num_tokens, hidden, *heads, dtype)
    check_qkv(qkv_module.norm_qkv_rope_triton, case)
    if num_tokens <= MOST_TOKENS:
        check_qkv(qkv_module.norm_qkv_rope_few, case)
        case[1] = None  # the first layer: x is the stream itself
        check_qkv(qkv_module.norm_qkv_rope_few, case)


def test_norm_qkv_rope_leaves_other_slots_alone():
    case = make_qkv(3, 64, 2, 1, 64, torch.float32)
    for cache in case[7:9]:
        cache.fill_(7.0)
    qkv_module.norm_qkv_rope_few(*case)
    for cache in case[7:9]:
        rows = cache.flatten(0, 1)
        rows[case[9]] = 7.0
        assert (rows == 7.0).all()


def planted_qkv(fault):
    def wrong(*args):
        q, total = qkv_module.norm_qkv_rope_few(*args)
        fault(q, total, args[7].flatten(0, 1), args[9])
        return q, total

    return wrong


@pytest.mark.parametrize(
    "fault",
    [
        lambda q, total, k, slots: q[0, 1, :16].mul_(1.01),
        lambda q, total, k, slots: total[0, 32:].mul_(1.01),
        lambda q, total, k, slots: k[slots[1]].fill_(torch.nan),
        lambda q, total, k, slots: k.copy_(k.roll(1, 0)),  # off by one in the slots
    ],
)
def test_planted_errors_of_qkv_are_found(fault):
    case = make_qkv(3, 64, 2, 1, 64, torch.float16)
    check_qkv(qkv_module.norm_qkv_rope_few, case)
    with pytest.raises(AssertionError):
        check_qkv(planted_qkv(fault), case)


def test_every_implementation_of_qkv(norm_qkv_rope, device, dtype, assert_near):
    case = make_qkv(3, 72, 3, 1, 16, dtype)
    case = [a.to(device) if torch.is_tensor(a) else a for a in case]
    ours = run_qkv(norm_qkv_rope, case, dtype)
    exact = run_qkv(partial(composed_qkv, TORCH), case, torch.float64)
    for out, reference in zip(ours, exact, strict=True):
        # roundings one after the other; a small number comes of a sum of larger ones
        assert_near(out.flatten(1), reference.flatten(1).cpu(), factor=3)


def make_mlp(num_tokens, hidden, width, dtype):
    device = where_kernels_run()
    x, residual = (torch.randn(num_tokens, hidden).to(device, dtype) for _ in range(2))
    norm = (1 + torch.randn(hidden) / 8).to(device, dtype)
    return x, residual, norm, EPS, (torch.randn(2 * width, hidden) / hidden**0.5).to(device, dtype)


def check_mlp(function, case):
    twin = mlp_module.norm_swiglu_torch
    wide = [a.double() if torch.is_tensor(a) else a for a in case]
    for out, like, exact in zip(function(*case), twin(*case), twin(*wide), strict=True):
        assert_as_near_as_twin(out, like, exact)


@half_and_single
@pytest.mark.parametrize("width", [30, 48, 127])
@pytest.mark.parametrize(("num_tokens", "hidden"), SIZES)
def test_norm_swiglu(dtype, num_tokens, hidden, width):
    case = make_mlp(num_tokens, hidden, width, dtype)
    check_mlp(mlp_module.norm_swiglu_triton, case)
    if num_tokens <= MOST_TOKENS:
        check_mlp(mlp_module.norm_swiglu_few, case)


@pytest.mark.parametrize(
    "fault",
    [
        lambda y, total: y[0, :16].mul_(1.01),
        lambda y, total: y[-1].copy_(y[0]),
        lambda y, total: total[0, 32:].mul_(1.01),
        lambda y, total: y.copy_(y.roll(1, 1)),  # off by one in the rows
    ],
)
def test_planted_errors_of_the_mlp_are_found(fault):
    def wrong(*args):
        y, total = mlp_module.norm_swiglu_few(*args)
        fault(y, total)
        return y, total

    with pytest.raises(AssertionError):
        check_mlp(wrong, make_mlp(3, 64, 48, torch.float16))


def test_every_implementation_of_the_mlp(norm_swiglu, device, dtype, assert_near):
    case = make_mlp(3, 72, 48, dtype)
    ours = norm_swiglu(*(a.to(device) if torch.is_tensor(a) else a for a in case))
    exact = composed_mlp(TORCH, *(a.double() if torch.is_tensor(a) else a for a in case))
    for out, reference in zip(ours, exact, strict=True):
        assert_near(out, reference.cpu(), factor=3)  # roundings one after the other


def test_every_implementation_of_the_router(norm_router, device, dtype, assert_near):
    case = make_router(3, 72, 16, 4, dtype)
    case = [a.to(device) if torch.is_tensor(a) else a for a in case]
    y, total, weights, ids = norm_router(*case)
    exact, exact_total = TORCH.norm(*(t.double() for t in case[:3]), EPS)
    assert_near(y, exact.cpu(), factor=3)
    assert_near(total, exact_total.cpu())
    expected = TORCH.router(y, *case[4:])
    assert torch.equal(ids, expected[1])
    assert_near(weights, expected[0].double().cpu())


def make_router(num_tokens, hidden, num_experts, top_k, dtype):
    device = where_kernels_run()
    x, residual = (torch.randn(num_tokens, hidden).to(device, dtype) for _ in range(2))
    norm = (1 + torch.randn(hidden) / 8).to(device, dtype)
    weight = (torch.randn(num_experts, hidden) / hidden**0.5).to(device)
    bias = (20 + torch.rand(num_experts) * 0.03).to(device)
    return [x, residual, norm, EPS, weight, bias, top_k, NORM_MIN]


def check_router(function, case):
    twin, (x, residual, norm, eps, *rest) = router_module.norm_router_torch, case
    y, total, weights, ids = function(*case)
    like, like_total, *_ = twin(*case)
    wide = (None if t is None else t.double() for t in (x, residual, norm))
    exact, exact_total, *_ = twin(*wide, eps, *rest)
    assert_as_near_as_twin(y, like, exact)
    assert_as_near_as_twin(total, like_total, exact_total)
    # The choice is for what came out of the norm, whose last bit may differ.
    by_twin = TORCH.router(y, *rest)
    assert torch.equal(ids, by_twin[1])
    unit = max(torch.finfo(weights.dtype).eps, 1e-5)
    torch.testing.assert_close(weights, by_twin[0], rtol=unit, atol=0)


@half_and_single
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (5, 5), (7, 1)])
@pytest.mark.parametrize(("num_tokens", "hidden"), SIZES)
def test_norm_router(dtype, num_tokens, hidden, num_experts, top_k):
    case = make_router(num_tokens, hidden, num_experts, top_k, dtype)
    check_router(router_module.norm_router_triton, case)
    if num_tokens <= MOST_TOKENS:
        check_router(router_module.norm_router_few, case)
        case[1] = None
        check_router(router_module.norm_router_few, case)


def test_a_wrong_expert_is_found():
    def wrong(*args):
        y, total, weights, ids = router_module.norm_router_few(*args)
        return y, total, weights, ids.roll(1, 0)

    with pytest.raises(AssertionError):
        check_router(wrong, make_router(3, 64, 16, 2, torch.float16))


def test_tickets_are_back_at_zero():
    check_router(router_module.norm_router_few, make_router(5, 64, 16, 2, torch.float16))
    device = router_module.norm_router_few(*make_router(1, 64, 16, 2, torch.float16))[0].device
    assert not tickets.tickets("norm_router", device).any()
