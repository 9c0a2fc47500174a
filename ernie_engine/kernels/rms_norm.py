"""RMSNorm, alone and after the residual add.

    y = round(x / sqrt(mean(x^2) + eps)) * weight

The mean and the quotient are fp32; the quotient is rounded to x's dtype *before* the weight
multiplies it, and the product is rounded again, as transformers does. The residual stream is
kept in x's dtype: the norm sees the rounded sum, never a wider one.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs

# By hidden size: a program holds a whole row.
TABLE = {
    (DEFAULT, 1024): {"num_warps": 4},
    (DEFAULT, 4096): {"num_warps": 8},
    (DEFAULT, 16384): {"num_warps": 16},
    ("sm_90", 1024): {"num_warps": 2},
    ("sm_90", 8192): {"num_warps": 8},
}
CANDIDATES = [{"num_warps": warps} for warps in (1, 2, 4, 8, 16)]


@triton.jit
def _normed(x, weight, hidden, eps):
    """x [BLOCK] fp32, zero beyond `hidden`; weight [BLOCK] -> [BLOCK], rounded as the twin does."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    quotient = (x * scale).to(weight.dtype)
    # The fp32 product of two half-precision numbers is exact: one rounding, at the store.
    return quotient.to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(x, weight, y, x_stride, hidden, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < hidden
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(values, tl.load(weight + columns, mask=inside, other=0.0), hidden, eps)
    tl.store(y + row * hidden + columns, normed, mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    x_stride,
    residual_stride,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < hidden
    added = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    old = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
    rounded = (old.to(tl.float32) + added.to(tl.float32)).to(old.dtype)
    tl.store(total + row * hidden + columns, rounded, mask=inside)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    normed = _normed(rounded.to(tl.float32), weights, hidden, eps)
    tl.store(y + row * hidden + columns, normed, mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], rows contiguous, weight [H] -> [T, H]."""
    rows, hidden = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous() and x.dtype == weight.dtype
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    block, options = triton.next_power_of_2(hidden), pick(TABLE, x.device, hidden)
    _rms_norm_kernel[(rows,)](
        *(x, weight, y, x.stride(0), hidden, eps), BLOCK=block, **options, **overlap(x.device)
    )
    return y


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], rows contiguous, weight [H] -> (y [T, H], new residual [T, H])."""
    rows, hidden = x.shape
    assert x.stride(1) == 1 and residual.stride(1) == 1 and weight.is_contiguous()
    assert x.dtype == residual.dtype == weight.dtype
    y, total = (torch.empty(rows, hidden, dtype=x.dtype, device=x.device) for _ in range(2))
    block, options = triton.next_power_of_2(hidden), pick(TABLE, x.device, hidden)
    strides = x.stride(0), residual.stride(0)
    _add_rms_norm_kernel[(rows,)](
        *(x, residual, weight, y, total, *strides, hidden, eps),
        BLOCK=block,
        **options,
        **overlap(x.device),
    )
    return y, total


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], weight [H] -> [T, H]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)  # [T, 1]
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], weight [H] -> (y [T, H], new residual [T, H]).

    The new residual is residual + x, rounded; y is its RMSNorm. Inputs stay as they are.
    """
    residual = residual + x
    return rms_norm_torch(residual, weight, eps), residual


IMPLEMENTATIONS = {
    "rms_norm": {"triton": rms_norm_triton, "torch": rms_norm_torch},
    "add_rms_norm": {"triton": add_rms_norm_triton, "torch": add_rms_norm_torch},
}
