"""Dense product without a bias: y = x @ weight.T, rounded once to the dtype of x.

Never reduces over ranks: the parallel layers do that with what comes out.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]."""
    return F.linear(x, weight)


IMPLEMENTATIONS = {"linear": {"torch": linear_torch}}
