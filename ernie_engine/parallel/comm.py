"""Collectives of the tp axis. With one rank each is the identity. Owns no weight."""

import torch
import torch.distributed as dist
from torch import Tensor

from ernie_engine.parallel.mesh import Mesh


def all_reduce(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum of `x` over the tp axis, in place."""
    if mesh.tp_size > 1:
        mesh.pulse.beat()
        dist.all_reduce(x, group=mesh.tp_group)
    return x


def all_gather_last(x: Tensor, mesh: Mesh) -> Tensor:
    """Concatenation over the tp axis along the last dim: [..., n] -> [..., n * tp_size]."""
    if mesh.tp_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(mesh.tp_size)]
    mesh.pulse.beat()
    dist.all_gather(parts, x.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim=-1)


def check_equal(x: Tensor, mesh: Mesh, what: str) -> None:
    """RuntimeError unless `x` is the same on every rank of the tp axis. For debugging: it waits."""
    everywhere = all_gather_last(x.flatten(), mesh).view(mesh.tp_size, -1)
    if not (everywhere == everywhere[0]).all():
        raise RuntimeError(f"{what} differ between the ranks of a stage: {everywhere.tolist()}")
