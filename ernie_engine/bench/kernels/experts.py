"""Cases of the router, also fused with its norm, and of the experts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import Tensors, near, near_each
from ernie_engine.bench.kernels.shapes import RankShape
from ernie_engine.kernels.parts import TORCH

NORM_MIN, EPS = 1e-12, 1e-5
NEAR_TIE = 4e-6  # p + bias near 24 is rounded to about 2e-6: two so near may change places


def router_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    if not shape.num_experts:
        return

    def make(device):
        x = torch.randn(tokens, shape.hidden, dtype=dtype, device=device)
        weight = torch.randn(shape.num_experts, shape.hidden, device=device) / shape.hidden**0.5
        bias = 22 + torch.rand(shape.num_experts, device=device) * 0.03  # like a trained one
        return x, weight, bias, shape.top_k, NORM_MIN

    weights = shape.num_experts * (shape.hidden + 1) * 4
    moved = tokens * (shape.hidden * dtype.itemsize + shape.top_k * (8 + dtype.itemsize)) + weights
    flops = 2 * tokens * shape.hidden * shape.num_experts
    yield KernelCase("router", shape.name, tokens, make, Work(moved, flops), same_choices)


def same_choices(
    arguments: Sequence[Any], out: Tensors, wide: Callable[[], Tensors], twin: Tensors
) -> str | None:
    """The experts of fp64 but for near-ties; the weights of the experts chosen."""
    x, weight, bias, _, norm_min = arguments
    weights, ids = out
    p = (x.double() @ weight.double().T).softmax(dim=-1)
    score = p + bias.double()
    order = ids.sort(dim=-1).values
    if (order.diff(dim=-1) <= 0).any() or order.min() < 0 or order.max() >= len(bias):
        return "not distinct experts"
    rest = score.scatter(1, ids, -torch.inf).amax(dim=-1)
    chosen = score.gather(1, ids)
    if (chosen.amin(dim=-1) < rest - NEAR_TIE).any():
        return "a better expert was left out"
    if (chosen.diff(dim=-1) > NEAR_TIE).any():
        return "not best first"
    exact, torch_op = (
        _normalised(scores.gather(1, ids), norm_min)
        for scores in (p, (x.float() @ weight.T).softmax(dim=-1))
    )
    return near_each(weights, exact, torch_op.to(weights.dtype))


def _normalised(chosen: torch.Tensor, norm_min: float) -> torch.Tensor:
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)


def norm_router_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    for router in router_cases(shape, tokens, dtype):

        def make(device, router=router):
            x, *rest = router.make(device)
            residual, norm = torch.randn_like(x), 1 + torch.randn_like(x[:1]) / 8
            return x, residual, norm[0] if tokens else norm, EPS, *rest

        more = 3 * tokens * shape.hidden * dtype.itemsize
        work = Work(router.work.num_bytes + more, router.work.flops)
        yield KernelCase("norm_router", router.label, tokens, make, work, near_and_same_choices)


def near_and_same_choices(
    arguments: Sequence[Any], out: Tensors, wide: Callable[[], Tensors], twin: Tensors
) -> str | None:
    """The norm near fp64; the choice right for what came out of the norm."""
    normed, total, weights, ids = out
    if problem := near((), [normed, total], lambda: wide()[:2], twin[:2]):
        return problem
    return same_choices((normed, *arguments[4:]), [weights, ids], wide, twin)


def moe_experts_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Balanced routing: every token draws its experts at random; with the shared experts."""
    if not shape.num_experts:
        return
    local, width, hidden = shape.local_experts, shape.expert_width, shape.hidden
    shared = shape.shared_width

    def make(device):
        x = torch.randn(tokens, hidden, dtype=dtype, device=device)
        gate_up = torch.randn(local, 2 * width, hidden, dtype=dtype, device=device) / hidden**0.5
        down = torch.randn(local, hidden, width, dtype=dtype, device=device) / width**0.5
        scores = torch.rand(tokens, shape.num_experts, device=device)
        weights, ids = scores.topk(shape.top_k)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(dtype)
        if not shared:
            return x, gate_up, down, weights, ids
        shared_gate_up = torch.randn(2 * shared, hidden, dtype=dtype, device=device) / hidden**0.5
        shared_down = torch.randn(hidden, shared, dtype=dtype, device=device) / shared**0.5
        return x, gate_up, down, weights, ids, 0, shared_gate_up, shared_down

    touched = local * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)
    weights_read = 3 * hidden * (touched * width + shared)
    moved = (weights_read + 2 * tokens * hidden) * dtype.itemsize
    pairs = tokens * shape.top_k * local / shape.num_experts
    flops = 6 * hidden * (pairs * width + tokens * shared)
    yield KernelCase("moe_experts", shape.name, tokens, make, Work(moved, flops))


MOST_FUSED = 8  # tokens; for more norm_moe is norm_router and moe_experts one after the other


def norm_moe_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Tokens whose choice no rounding changes: of eight times as many those that are clearest."""
    if tokens > MOST_FUSED:
        return
    experts_cases = moe_experts_cases(shape, tokens, dtype)
    for router, experts in zip(
        norm_router_cases(shape, 8 * tokens, dtype), experts_cases, strict=True
    ):

        def make(device, router=router, experts=experts):
            x, residual, *route = router.make(device)
            norm, eps, weight, bias, top_k, _ = route
            y, _ = TORCH.norm(x, residual, norm, eps)
            scores = (y.float() @ weight.T).softmax(dim=-1) + bias
            best = scores.topk(min(top_k + 1, len(bias)), dim=-1).values
            clearest = (best[:, top_k - 1] - best[:, -1]).topk(tokens).indices
            _, gate_up, down, _, _, *rest = experts.make(device)
            return x[clearest], residual[clearest], *route, gate_up, down, *rest

        moved = router.work.num_bytes + experts.work.num_bytes
        work = Work(moved, router.work.flops + experts.work.flops)
        yield KernelCase("norm_moe", shape.name, tokens, make, work)
