"""What fusions are made of: the ops of one implementation, by name.

A fusion is one launch for what its parts do in several; its twin is their composition. Owns the two
complete sets; the registry makes mixed ones. Never chooses.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ernie_engine.kernels.linear import linear_torch, linear_triton
from ernie_engine.kernels.rms_norm import (
    add_rms_norm_torch,
    add_rms_norm_triton,
    rms_norm_torch,
    rms_norm_triton,
)
from ernie_engine.kernels.rope import rope_and_cache_torch, rope_and_cache_triton
from ernie_engine.kernels.router import router_torch, router_triton
from ernie_engine.kernels.swiglu import swiglu_torch, swiglu_triton


@dataclass(frozen=True)
class Parts:
    linear: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_and_cache: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    router: Callable[..., tuple[Tensor, Tensor]]

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] -> norm(residual + x), residual + x."""
        if residual is None:
            return self.rms_norm(x, weight, eps), x
        return self.add_rms_norm(x, residual, weight, eps)


TORCH = Parts(
    *(linear_torch, rms_norm_torch, add_rms_norm_torch),
    *(rope_and_cache_torch, swiglu_torch, router_torch),
)
TRITON = Parts(
    *(linear_triton, rms_norm_triton, add_rms_norm_triton),
    *(rope_and_cache_triton, swiglu_triton, router_triton),
)
