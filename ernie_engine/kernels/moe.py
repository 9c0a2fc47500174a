"""The experts' SwiGLU MLPs: the routed ones' weighted sum, and the shared ones.

    y[t] = sum_j w[t, j] * down[e] @ swiglu(gate_up[e] @ x[t]),   e = ids[t, j]
         + shared_down @ swiglu(shared_gate_up @ x[t])

Each w * y is rounded to the dtype; the k of them are summed in fp32, in the order of ids, and
rounded once (without sorting in another order, as fixed); the shared experts' output, rounded, is
added and the sum rounded again. With experts
dealt out over ranks, those of other ranks add nothing here and the sum is a partial one. Never sees
the router's bias.

Two sets of kernels by the number of tokens: moe_few.py reads each token's experts for itself,
moe_grouped.py sorts the tokens by expert so that each expert is read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, pick
from ernie_engine.kernels.moe_few import moe_experts_few
from ernie_engine.kernels.moe_grouped import moe_experts_grouped
from ernie_engine.kernels.swiglu import swiglu_torch

# By tokens: 1 = without sorting. An H100 takes at 1 / 2 / 4 / 8 tokens of 21B 67 / 127 / 251 / 495
# us without, 101 / 141 / 174 / 311 us with it: of 24 experts chosen by 4 tokens 21 are different.
FEW = {
    (DEFAULT, 4): {"FEW": 1},
    (DEFAULT, 5): {"FEW": 0},
    ("sm_90", 2): {"FEW": 1},
    ("sm_90", 16): {"FEW": 0},
}
FEW_CANDIDATES = [{"FEW": 1}, {"FEW": 0}]


def moe_experts_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """As the twin; all tensors contiguous."""
    tensors = x, gate_up, down, weights, ids, shared_gate_up, shared_down
    assert all(t is None or t.is_contiguous() for t in tensors)
    if x.numel() == 0:
        return torch.empty_like(x)
    width = 0 if shared_down is None else shared_down.shape[1]
    few = pick(FEW, x.device, len(x))["FEW"] and width % down.shape[2] == 0
    run = moe_experts_few if few else moe_experts_grouped
    return run(x, gate_up, down, weights, ids, first_expert, shared_gate_up, shared_down)


def moe_experts_torch(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """x [T, H], gate_up [E, 2 I, H] (gate rows first), down [E, H, I], weights [T, k],
    ids [T, k] int64, the ids of a token distinct, shared_gate_up [2 Is, H], shared_down [H, Is],
    or no shared experts -> [T, H].

    The matrices are those of the experts first_expert .. first_expert + E - 1; an id outside
    that range is passed over. Rows are sorted by expert: one pair of products for each in use.
    """
    y = _routed(x, gate_up, down, weights, ids, first_expert)
    if shared_gate_up is None or shared_down is None:
        return y
    return y + F.linear(swiglu_torch(F.linear(x, shared_gate_up)), shared_down)


def _routed(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, first_expert: int
) -> Tensor:
    """The weighted sum of the routed experts."""
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


IMPLEMENTATIONS = {"moe_experts": {"triton": moe_experts_triton, "torch": moe_experts_torch}}
