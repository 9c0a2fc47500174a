"""Optimisation on float32 masters of a model that may be bfloat16: what is trained is exported.

The forward pass always sees the rounded weights, as every later user of the checkpoint will.
Matrices inside layers are updated by Muon or AdamW; embedding, router and norms by AdamW.
"""

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients, five rounds


class MasterOptimizer:
    """`step(lr)` takes the gradients from the parameters, clips them, and writes the weights back.

    Matrices decay, vectors (norms) do not. Gradients are released by the step.
    """

    def __init__(
        self, model: nn.Module, weight_decay: float, beta2: float, clip: float, muon: bool
    ):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.clip = clip
        pairs = list(zip((name for name, _ in named), self.masters, strict=True))
        inner = [m for name, m in pairs if muon and m.dim() > 1 and "_proj" in name]
        ids = {id(m) for m in inner}
        rest = [m for m in self.masters if id(m) not in ids]
        groups = [
            {"params": [m for m in rest if m.dim() > 1], "weight_decay": weight_decay},
            {"params": [m for m in rest if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)
        self.muon = Muon(inner, weight_decay)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """One update; returns the gradient's norm before clipping, on the device."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.muon.step(lr)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
        return norm


class Muon:
    """Momentum whose matrix is replaced by the nearest orthogonal one (K. Jordan et al., 2024).

    Updates are scaled by 0.2 sqrt(max(rows, columns)), the size of AdamW's, so that one learning
    rate serves both (Liu et al., "Muon is scalable for LLM training", 2025). Matrices of one shape
    go through together; leading dimensions count matrices.
    """

    def __init__(self, masters: list[Tensor], weight_decay: float):
        self.weight_decay = weight_decay
        shapes = dict.fromkeys(master.shape for master in masters)
        self.groups = [[m for m in masters if m.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(group)) for group in self.groups]

    def step(self, lr: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([m.grad for m in group if m.grad is not None])
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonal(gradient.lerp_(momentum, _MOMENTUM))
            size = 0.2 * max(update.shape[-2:]) ** 0.5
            for master, change in zip(group, update, strict=True):
                master.mul_(1 - lr * self.weight_decay).add_(change, alpha=-lr * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Singular values of each matrix to about 1, by Newton-Schulz; [..., R, C], computed in
    bfloat16.
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).float()
