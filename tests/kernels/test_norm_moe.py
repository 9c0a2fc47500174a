"""A layer's experts from the residual to their sum: two launches against the twins' composition."""

import pytest
import torch

from ernie_engine.kernels import norm_moe
from ernie_engine.kernels.norm_moe import TORCH, norm_gate_up, norm_moe_few
from ernie_engine.kernels.swiglu import swiglu_torch
from ernie_engine.kernels.tickets import tickets
from tests.kernels.test_fusions import check_router, make_router
from tests.kernels.tile_check import assert_as_near_as_twin, half_and_single, where_kernels_run

# tokens, hidden size, experts, width, top_k, shared experts
SIZES = [(1, 64, 16, 24, 3, 2), (2, 72, 64, 16, 6, 1), (1, 40, 5, 17, 5, 0), (3, 100, 7, 8, 1, 2)]


def make(dtype, num_tokens, hidden, num_experts, width, top_k, num_shared):
    route = make_router(num_tokens, hidden, num_experts, top_k, dtype)
    if dtype.itemsize == 2:
        route[4] *= 8  # no rounding changes a choice of router logits so far apart
    route[5].zero_()
    device = where_kernels_run()

    def weight(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(device, dtype)

    experts = [weight(num_experts, 2 * width, hidden), weight(num_experts, hidden, width), 0]
    if num_shared:
        wide = num_shared * width
        experts += [weight(2 * wide, hidden), weight(hidden, wide)]
    return route, experts


def in_fp64(case):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in case]


def check(function, route, experts):
    ours = function(*route, *experts)
    twin = norm_moe.norm_moe_torch(*route, *experts)
    exact = norm_moe.norm_moe_torch(*in_fp64(route), *in_fp64(experts))
    for out, like, reference in zip(ours, twin, exact, strict=True):
        assert_as_near_as_twin(out, like, reference)
    assert not tickets("norm_moe", ours[0].device).any()
    assert not tickets("norm_moe.choices", ours[0].device).any()


@half_and_single
@pytest.mark.parametrize("sizes", SIZES)
def test_two_launches(dtype, sizes):
    route, experts = make(dtype, *sizes)
    check(norm_moe_few, route, experts)
    check(norm_moe_few, route, experts)  # and leave the counters as they found them
    check(norm_moe.norm_moe_triton, route, experts)


@half_and_single
def test_a_share_of_the_experts(dtype):
    # One expert's weight gives an error of a whole row: many rows, or chance decides.
    num_tokens = 24 if where_kernels_run() == "cuda" else 4
    route, (gate_up, down, _, *shared) = make(dtype, num_tokens, 64, 8, 16, 3, 1)
    check(norm_moe_few, route, [gate_up[3:6].clone(), down[3:6].clone(), 3, *shared])
    check(norm_moe_few, route, [gate_up[7:].clone(), down[7:].clone(), 7])


@half_and_single
@pytest.mark.parametrize("sizes", SIZES)
def test_the_first_launch(dtype, sizes):
    """The choice as exact as norm_router's, and of the hidden tokens every one."""
    _, _, num_experts, width, top_k, num_shared = sizes
    _, (gate_up, down, _, *shared) = make(dtype, *sizes)
    route = make_router(*sizes[:3], top_k, dtype)

    def router(*args):
        begun = norm_gate_up(*args, gate_up, 0, shared[0] if shared else None)
        begun.choices.zero_()
        return begun.normed, begun.total, begun.weights, begun.ids

    check_router(router, route)
    begun = norm_gate_up(*route, gate_up, 0, shared[0] if shared else None)
    assert torch.equal(begun.choices[: begun.ids.numel()].view_as(begun.ids), begun.ids.int() + 1)
    begun.choices.zero_()
    y, rows = begun.normed, gate_up[begun.ids]  # [T, k, 2 I, H]

    def hidden(dtype):
        routed = swiglu_torch(torch.einsum("th,tkih->tki", y.to(dtype), rows.to(dtype)))
        if not num_shared:
            return routed
        of_shared = swiglu_torch(y.to(dtype) @ shared[0].to(dtype).T)
        return torch.cat([of_shared.unflatten(1, (num_shared, width)), routed], dim=1)

    near = hidden(dtype), hidden(torch.float64)
    assert_as_near_as_twin(begun.hidden.flatten(1), *(t.flatten(1) for t in near))
    assert num_experts == len(down)


@pytest.mark.skipif(
    where_kernels_run() == "cuda", reason="a compiled kernel keeps the number that it found first"
)
def test_a_choice_that_is_never_made_gives_nan_not_a_hang(monkeypatch):
    route, experts = make(torch.float32, 1, 64, 8, 16, 2, 0)
    monkeypatch.setattr(norm_moe, "MOST_POLLS", norm_moe.tl.constexpr(3))
    monkeypatch.setattr(norm_moe, "is_last", lambda *args: False)
    assert norm_gate_up(*route, experts[0], 0, None).hidden.isnan().all()


def planted(fault):
    def wrong(*args):
        out, total = norm_moe_few(*args)
        fault(out, total)
        return out, total

    return wrong


@pytest.mark.parametrize(
    "fault",
    [
        lambda out, total: out[0, :16].mul_(1.01),
        lambda out, total: total[0, 32:].mul_(1.01),
        lambda out, total: out[1].copy_(out[0]),
        lambda out, total: out[1].fill_(torch.nan),
    ],
)
def test_planted_errors_are_found(fault):
    route, experts = make(torch.float16, 2, 64, 16, 24, 3, 2)
    check(norm_moe_few, route, experts)
    with pytest.raises(AssertionError):
        check(planted(fault), route, experts)


def test_a_wrong_expert_is_found():
    route, experts = make(torch.float16, 2, 64, 16, 24, 3, 2)

    def wrong(*args):
        args = list(args)
        args[8] = args[8].roll(1, 0)
        return norm_moe_few(*args)

    with pytest.raises(AssertionError):
        check(wrong, route, experts)


def test_every_implementation(norm_moe, device, dtype, assert_near):
    route, experts = (
        [t.to(device) if torch.is_tensor(t) else t for t in part]
        for part in make(dtype, 3, 72, 16, 24, 4, 2)
    )
    out, total = norm_moe(*route, *experts)
    exact = TORCH.norm_router(*in_fp64(route))
    gate_up, down, *rest = in_fp64(experts)
    expected = TORCH.moe_experts(exact[0], gate_up, down, *exact[2:], *rest)
    assert_near(out, expected.cpu(), factor=4)  # the roundings of both parts
    assert_near(total, exact[1].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_same_bits_again(num_tokens):
    """Whatever finishes first; hundreds of launches whose programs wait for one another."""
    route, experts = make(torch.bfloat16, num_tokens, 2560, 64, 1536, 6, 2)
    expected = norm_moe_few(*route, *experts)
    for _ in range(300):
        again = norm_moe_few(*route, *experts)
        assert all(map(torch.equal, again, expected))
