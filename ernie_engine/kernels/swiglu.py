"""SwiGLU: y = silu(gate) * up, with silu(z) = z / (1 + exp(-z)).

silu is fp32 inside and rounded to the dtype before the product, which is rounded again: two
roundings, as the reference has them.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gate in the first half -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


IMPLEMENTATIONS = {"swiglu": {"torch": swiglu_torch}}
