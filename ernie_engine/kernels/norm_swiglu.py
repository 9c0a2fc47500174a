"""The way into a dense MLP in one launch: residual add, RMSNorm, gate and up, SwiGLU.

    h = residual + x;  gate, up = split(norm(h) @ gate_up.T);  y = silu(gate) * up

Each rounding is that of the parts (add_rms_norm, linear, swiglu), but a half type forgives SwiGLU's
quotient its last two bits. Their composition is the twin, and what runs for more tokens than the
kernel takes. Each program holds some rows of gate and of up and norms every token for itself, as in
norm_qkv_rope.py.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.gemv import (
    MOST_HIDDEN,
    MOST_TOKENS,
    dot_rows,
    load_rows,
    load_vector,
    normed_vector,
)
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.moe_few import silu_product
from ernie_engine.kernels.parts import TORCH, TRITON, Parts

# By hidden size. BLOCK: rows of gate and of up each.
TABLE = {
    (DEFAULT, 1024): {"BLOCK": 4, "num_warps": 4},
    (DEFAULT, 4096): {"BLOCK": 2, "num_warps": 4},
    (DEFAULT, 8192): {"BLOCK": 1, "num_warps": 4},
    ("sm_90", 1024): {"BLOCK": 4, "num_warps": 2},
    ("sm_90", 2560): {"BLOCK": 4, "num_warps": 4},
    ("sm_90", 8192): {"BLOCK": 1, "num_warps": 8},
}
CANDIDATES = [{"BLOCK": block, "num_warps": warps} for block in (1, 2, 4, 8) for warps in (2, 4, 8)]
# By tokens: 1 = the one launch.
FEW = {
    (DEFAULT, 4): {"FEW": 1},
    (DEFAULT, 5): {"FEW": 0},
    ("sm_90", 1): {"FEW": 1},
    ("sm_90", 2): {"FEW": 0},
}
FEW_CANDIDATES = [{"FEW": 1}, {"FEW": 0}]


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_swiglu_kernel(
    x,
    residual,
    norm,
    weight,
    total,
    y,
    eps,
    num_tokens,
    I: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x, residual [T, K], weight [2 I, K] -> total [T, K], y [T, I]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate_rows = load_rows(weight, row, I, K, WIDTH)
    up_rows = load_rows(weight + I * K, row, I, K, WIDTH)
    norm_weight = load_vector(norm, K, WIDTH)
    is_first = tl.program_id(0) == 0
    wait_for_inputs(PDL)
    for token in tl.range(0, num_tokens):
        at = token * K
        h = normed_vector(
            *(x + at, residual + at, norm_weight, total + at, eps, is_first, True, K, WIDTH)
        )
        value = silu_product(dot_rows(gate_rows, h), dot_rows(up_rows, h), y.dtype.element_ty)
        tl.store(y + token * I + row, value, mask=row < I)


def norm_swiglu_few(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, gate_up: Tensor
) -> tuple[Tensor, Tensor]:
    """As composed(), in one launch; all tensors contiguous, up to MOST_TOKENS and MOST_HIDDEN."""
    (num_tokens, hidden), width = x.shape, len(gate_up) // 2
    assert all(t.is_contiguous() for t in (x, residual, norm, gate_up))
    assert 0 < num_tokens <= MOST_TOKENS and hidden <= MOST_HIDDEN
    y, total = x.new_empty(num_tokens, width), torch.empty_like(x)
    launch = pick(TABLE, x.device, hidden)
    _norm_swiglu_kernel[(triton.cdiv(width, launch["BLOCK"]),)](
        *(x, residual, norm, gate_up, total, y, eps, num_tokens),
        I=width,
        K=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        **launch,
        **overlap(x.device),
    )
    return y, total


def composed(
    parts: Parts, x: Tensor, residual: Tensor, norm: Tensor, eps: float, gate_up: Tensor
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], norm [H], gate_up [2 I, H], gate first -> SwiGLU of norm(residual + x)
    [T, I], residual + x [T, H]."""
    h, total = parts.add_rms_norm(x, residual, norm, eps)
    return parts.swiglu(parts.linear(h, gate_up)), total


def norm_swiglu_triton(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, gate_up: Tensor
) -> tuple[Tensor, Tensor]:
    """As the twin, all tensors contiguous."""
    fits = len(x) > 0 and x.shape[1] <= MOST_HIDDEN
    few = fits and pick(FEW, x.device, len(x))["FEW"]
    return (norm_swiglu_few if few else partial(composed, TRITON))(x, residual, norm, eps, gate_up)


norm_swiglu_torch = partial(composed, TORCH)
IMPLEMENTATIONS = {"norm_swiglu": {"triton": norm_swiglu_triton, "torch": norm_swiglu_torch}}
