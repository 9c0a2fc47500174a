"""RMSNorm, alone and after the residual add.

    y = round(x / sqrt(mean(x^2) + eps)) * weight

The mean and the quotient are fp32; the quotient is rounded to x's dtype *before* the weight
multiplies it, and the product is rounded again, as transformers does. The residual stream is
kept in x's dtype: the norm sees the rounded sum, never a wider one.
"""

import torch
from torch import Tensor


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
    "rms_norm": {"torch": rms_norm_torch},
    "add_rms_norm": {"torch": add_rms_norm_torch},
}
