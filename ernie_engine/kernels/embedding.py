"""Token embedding: y[t] = weight[ids[t]].

Owns the row gather alone. Never masks or shifts ids: a table cut over ranks is its caller's
business. Unscaled, as ERNIE-4.5 has it.
"""

import torch.nn.functional as F
from torch import Tensor


def embedding_torch(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [T] int64, weight [V, H] -> [T, H] in the weight's dtype."""
    return F.embedding(ids, weight)


IMPLEMENTATIONS = {"embedding": {"torch": embedding_torch}}
