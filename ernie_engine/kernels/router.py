"""Choice of experts, in fp32 from the product to the weights.

    p = softmax(x @ weight.T);  ids = the top_k largest of p + bias, best first
    w = p[ids] / max(sum p[ids], norm_min)

The bias only selects. Trained biases stand near +22..+63 and differ by hundredths, so neither
the product, the bias nor p + bias may be rounded below fp32. Even there exact ties occur: they
go to the lower expert id.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def router_torch(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [E, H] fp32, bias [E] fp32 -> (weights [T, k] as x, ids [T, k] int64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    p = F.linear(x.to(dtype), weight.to(dtype)).softmax(dim=-1)  # [T, E]
    ids = (p + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = p.gather(1, ids)
    chosen = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return chosen.to(x.dtype), ids


IMPLEMENTATIONS = {"router": {"torch": router_torch}}
