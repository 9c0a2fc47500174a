"""Cases of the router and of the routed experts."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import Tensors, near
from ernie_engine.bench.kernels.shapes import RankShape

NORM_MIN = 1e-12
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
    arguments: Sequence[Any], out: Tensors, wide: Tensors, twin: Tensors
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
    exact = p.gather(1, ids)
    exact = exact / exact.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return near(arguments, (weights,), (exact,), (exact.to(weights.dtype),))


def moe_experts_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Balanced routing: every token draws its experts at random."""
    if not shape.num_experts:
        return
    local, width, hidden = shape.local_experts, shape.expert_width, shape.hidden

    def make(device):
        x = torch.randn(tokens, hidden, dtype=dtype, device=device)
        gate_up = torch.randn(local, 2 * width, hidden, dtype=dtype, device=device) / hidden**0.5
        down = torch.randn(local, hidden, width, dtype=dtype, device=device) / width**0.5
        scores = torch.rand(tokens, shape.num_experts, device=device)
        weights, ids = scores.topk(shape.top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return x, gate_up, down, weights.to(dtype), ids

    touched = local * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)
    moved = (touched * 3 * width * hidden + 2 * tokens * hidden) * dtype.itemsize
    pairs = tokens * shape.top_k * local / shape.num_experts
    yield KernelCase(
        "moe_experts", shape.name, tokens, make, Work(moved, 6 * pairs * width * hidden)
    )
