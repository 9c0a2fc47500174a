"""The routed experts' SwiGLU MLPs and their weighted sum.

    y[t] = sum_j w[t, j] * down[e] @ swiglu(gate_up[e] @ x[t]),   e = ids[t, j]

Each w * y is rounded to the dtype; the k of them are summed in fp32, in the order of ids, and
rounded once. With experts dealt out over ranks, those of other ranks add nothing here and the
sum is a partial one. Never sees the router's bias, nor shared experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_engine.kernels.swiglu import swiglu_torch


def moe_experts_torch(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, first_expert: int = 0
) -> Tensor:
    """x [T, H], gate_up [E, 2 I, H] (gate rows first), down [E, H, I], weights [T, k],
    ids [T, k] int64, the ids of a token distinct -> [T, H].

    The matrices are those of the experts first_expert .. first_expert + E - 1; an id outside
    that range is passed over. Rows are sorted by expert: one pair of products for each in use.
    """
    top_k, num_experts = ids.shape[1], gate_up.shape[0]
    local = ids.flatten() - first_expert
    local = local.where((local >= 0) & (local < num_experts), num_experts)  # others' come last
    order = local.argsort(stable=True)  # [T k]; entry t * k + j is token t's choice j
    counts = local.bincount(minlength=num_experts + 1).tolist()
    *own, others = order.split(counts)
    y = x.new_empty(ids.numel(), x.shape[1])
    y[others] = 0
    for expert, entries in enumerate(own):
        if entries.numel():
            hidden = swiglu_torch(F.linear(x[entries // top_k], gate_up[expert]))
            y[entries] = F.linear(hidden, down[expert])
    y = y.unflatten(0, ids.shape) * weights[..., None]  # [T, k, H]
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for choice in y.unbind(dim=1):
        total += choice
    return total.to(x.dtype)


IMPLEMENTATIONS = {"moe_experts": {"torch": moe_experts_torch}}
