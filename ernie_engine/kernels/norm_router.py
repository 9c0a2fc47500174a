"""The way into the experts in one launch: residual add, RMSNorm, choice of experts.

    h = residual + x;  y = norm(h);  weights, ids = router(y)

Each rounding is that of the parts: add_rms_norm, router. Their composition is the twin, and what
runs for more tokens than the kernel takes.

Each program holds some experts' rows and norms a few tokens for itself, one after the other; the
last to finish with these tokens chooses.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.gemv import dot_rows, load_rows, load_vector, normed_vector
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.parts import TORCH, TRITON, Parts
from ernie_engine.kernels.router import choose
from ernie_engine.kernels.tickets import is_last, tickets

# By hidden size. BLOCK_N: experts of a program.
TABLE = {
    (DEFAULT, 4096): {"BLOCK_N": 1, "num_warps": 4},
    (DEFAULT, 8192): {"BLOCK_N": 1, "num_warps": 8},
    ("sm_90", 8192): {"BLOCK_N": 1, "num_warps": 4},
}
CANDIDATES = [{"BLOCK_N": rows, "num_warps": warps} for rows in (1, 2, 4) for warps in (2, 4, 8)]
# By tokens: those of a program in the one launch; 0: by parts.
FEW = {
    (DEFAULT, 4): {"ROWS": 1},
    (DEFAULT, 5): {"ROWS": 0},
    ("sm_90", 16): {"ROWS": 1},
    ("sm_90", 32): {"ROWS": 2},
    ("sm_90", 33): {"ROWS": 0},
}
FEW_CANDIDATES = [{"ROWS": rows} for rows in (0, 1, 2, 4)]
CHOICE_ROWS = 4  # tokens that are chosen for together


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_router_kernel(
    x,
    residual,
    norm,
    weight,
    bias,
    total,
    normed,
    logits,
    weights,
    ids,
    ticket,
    eps,
    norm_min,
    num_tokens,
    HAS_RESIDUAL: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHOICE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    expert = first + tl.arange(0, BLOCK_N)
    rows = load_rows(weight, expert, NUM_EXPERTS, K, WIDTH)
    norm_weight = load_vector(norm, K, WIDTH)
    k = tl.arange(0, WIDTH)[None, :]
    wait_for_inputs(PDL)
    group = tl.program_id(1)
    end = tl.minimum((group + 1) * ROWS, num_tokens)
    for token in tl.range(group * ROWS, end):
        at = token * K
        y = normed_vector(
            x + at,
            residual + at,
            norm_weight,
            total + at,
            eps,
            first == 0,
            HAS_RESIDUAL,
            K,
            WIDTH,
        )
        tl.store(normed + at + k, y, mask=(k < K) & (first == 0))
        tl.store(
            logits + token * NUM_EXPERTS + expert, dot_rows(rows, y), mask=expert < NUM_EXPERTS
        )
    if is_last(ticket + group, tl.num_programs(0)):
        for start in tl.range(group * ROWS, end, CHOICE_ROWS):
            choose(
                logits,
                bias,
                weights,
                ids,
                start,
                end,
                NUM_EXPERTS,
                norm_min,
                TOP_K,
                EXPERTS,
                1,
                CHOICE_ROWS,
            )


def norm_router_few(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As composed(), in one launch; all tensors contiguous."""
    (num_tokens, hidden), num_experts = x.shape, len(weight)
    assert all(t.is_contiguous() for t in (x, norm, weight, bias)) and num_tokens > 0
    assert weight.dtype == bias.dtype == torch.float32
    normed, total = torch.empty_like(x), x
    if residual is not None:
        assert residual.is_contiguous()
        total = torch.empty_like(x)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    weights = x.new_empty(num_tokens, top_k)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=x.device)
    launch, counters = pick(TABLE, x.device, hidden), tickets("norm_router", x.device)
    rows = pick(FEW, x.device, num_tokens)["ROWS"] or 1
    groups = triton.cdiv(num_tokens, rows)
    assert groups <= len(counters)
    _norm_router_kernel[triton.cdiv(num_experts, launch["BLOCK_N"]), groups](
        *(x, x if residual is None else residual, norm, weight, bias),
        *(total, normed, logits, weights, ids, counters),
        *(eps, norm_min, num_tokens),
        HAS_RESIDUAL=residual is not None,
        NUM_EXPERTS=num_experts,
        K=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        TOP_K=top_k,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows,
        CHOICE_ROWS=CHOICE_ROWS,
        **launch,
        **overlap(x.device),
    )
    return normed, total, weights, ids


def composed(
    parts: Parts,
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [T, H] (None: x is the stream itself), norm [H], the rest as the router takes it
    -> the normed y [T, H], residual + x [T, H], weights [T, k], ids [T, k]."""
    y, total = parts.norm(x, residual, norm, eps)
    return y, total, *parts.router(y, weight, bias, top_k, norm_min)


def norm_router_triton(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the twin, all tensors contiguous."""
    few = len(x) and pick(FEW, x.device, len(x))["ROWS"]
    run = norm_router_few if few else partial(composed, TRITON)
    return run(x, residual, norm, eps, weight, bias, top_k, norm_min)


norm_router_torch = partial(composed, TORCH)
IMPLEMENTATIONS = {"norm_router": {"triton": norm_router_triton, "torch": norm_router_torch}}
