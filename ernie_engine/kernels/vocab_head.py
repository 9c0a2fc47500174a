"""The vocabulary head: logits = x @ weight.T, rounded to the dtype, then widened to fp32.

The rounding is the reference's; what reads logits (sampling, log-probabilities) works in fp32.
Never gathers over ranks: with a cut head the logits are this rank's share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def vocab_head_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, H], weight [V, H] -> logits [R, V] fp32 (fp64 if x is)."""
    return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))


IMPLEMENTATIONS = {"vocab_head": {"torch": vocab_head_torch}}
