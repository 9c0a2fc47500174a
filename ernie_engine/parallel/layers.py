"""Layers that know how their weight is cut over the tp axis: they allocate it, name its parts for
the loader and reduce what was computed with it.

Never imports a kernel (the model brings one) and never reads a file (weights.py does).
A weight's `parts` are the whole truth about loading: see WeightPart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie_engine.parallel import comm
from ernie_engine.parallel.mesh import Placement

Linear = Callable[[Tensor, Tensor], Tensor]  # (x [T, K], weight [N, K]) -> [T, N]
WHOLE = slice(None)


@dataclass(frozen=True)
class WeightPart:
    """The place of one checkpoint tensor in a parameter of this rank.

    `dst`, a view of the parameter, receives `checkpoint[name][index]`; `shape` is the whole
    tensor's shape in the checkpoint. The parts of a parameter cover it exactly once.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    dst: Tensor


def empty_weight(*shape: int, place: Placement, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter; the loader fills it."""
    data = torch.empty(shape, dtype=dtype or place.dtype, device=place.device)
    return nn.Parameter(data, requires_grad=False)


def whole_part(name: str, weight: Tensor, shape: tuple[int, ...] | None = None) -> WeightPart:
    """A parameter that every rank holds whole; `shape` if the checkpoint's differs (same size)."""
    shape = shape or tuple(weight.shape)
    return WeightPart(name, shape, (WHOLE,) * len(shape), weight.data.view(shape))


class ColumnParallelLinear(nn.Module):
    """y = x @ W.T, the rows of W cut over tp; several checkpoint matrices may be stacked in W.

    Weight [sum(out_features) / tp, in_features]: each matrix's own share, one after the other.
    """

    def __init__(
        self, in_features: int, out_features: Sequence[int], place: Placement, linear: Linear
    ):
        super().__init__()
        self.mesh, self.linear, self.out_features = place.mesh, linear, tuple(out_features)
        self.shares = [place.mesh.share(n, "output features") for n in out_features]
        self.weight = empty_weight(sum(self.shares), in_features, place=place)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, sum(out) / tp]
        return self.linear(x, self.weight)

    def parts(self, *names: str) -> Iterator[WeightPart]:
        views = self.weight.data.split(self.shares)
        for name, rows, dst in zip(names, self.out_features, views, strict=True):
            cut = self.mesh.cut(rows, name)
            yield WeightPart(name, (rows, dst.shape[1]), (cut, WHOLE), dst)


class QKVParallelLinear(nn.Module):
    """q, k and v in one product; heads cut over tp, K/V heads replicated when fewer than ranks.

    Weight [(Hq + 2 Hkv) * D, in_features] with this rank's Hq and Hkv.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        place: Placement,
        linear: Linear,
    ):
        super().__init__()
        mesh = place.mesh
        if num_kv_heads % mesh.tp_size and mesh.tp_size % num_kv_heads:
            raise ValueError(
                f"{num_kv_heads} K/V heads cannot be dealt to tensor_parallel_size={mesh.tp_size}"
            )
        self.mesh, self.linear, self.head_dim = mesh, linear, head_dim
        self.total_heads, self.total_kv_heads = num_heads, num_kv_heads
        self.num_heads = mesh.share(num_heads, "attention heads")
        self.num_kv_heads = max(1, num_kv_heads // mesh.tp_size)
        self.sizes = [n * head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.weight = empty_weight(sum(self.sizes), in_features, place=place)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, in] -> q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]: views of one product."""
        qkv = self.linear(x, self.weight).unflatten(-1, (-1, self.head_dim))
        return qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)  # pyright: ignore[reportReturnType]

    def parts(self, q: str, k: str, v: str) -> Iterator[WeightPart]:
        heads = self.mesh.cut(self.total_heads, q)
        first_kv = self.mesh.tp_rank * self.total_kv_heads // self.mesh.tp_size
        kv_heads = slice(first_kv, first_kv + self.num_kv_heads)
        totals = (self.total_heads, self.total_kv_heads, self.total_kv_heads)
        views = self.weight.data.split(self.sizes)
        for name, total, cut, dst in zip(
            (q, k, v), totals, (heads, kv_heads, kv_heads), views, strict=True
        ):
            rows = slice(cut.start * self.head_dim, cut.stop * self.head_dim)
            yield WeightPart(name, (total * self.head_dim, dst.shape[1]), (rows, WHOLE), dst)


class RowParallelLinear(nn.Module):
    """y = sum over tp of x @ W.T, the columns of W cut over tp. Weight [out, in / tp]."""

    def __init__(self, in_features: int, out_features: int, place: Placement, linear: Linear):
        super().__init__()
        self.mesh, self.linear, self.in_features = place.mesh, linear, in_features
        share = place.mesh.share(in_features, "input features")
        self.weight = empty_weight(out_features, share, place=place)

    def forward(self, x: Tensor) -> Tensor:  # [T, in / tp] -> [T, out]
        return comm.all_reduce(self.linear(x, self.weight), self.mesh)

    def parts(self, name: str) -> Iterator[WeightPart]:
        cut = self.mesh.cut(self.in_features, name)
        shape = (self.weight.shape[0], self.in_features)
        yield WeightPart(name, shape, (WHOLE, cut), self.weight.data)


class ExpertWeights(nn.Module):
    """The matrices of all routed experts, each cut along its width I over tp.

    gate_up [E, 2 I / tp, H] (gate rows first), down [E, H, I / tp].
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, place: Placement):
        super().__init__()
        self.mesh, self.width = place.mesh, width
        share = place.mesh.share(width, "moe_intermediate_size")
        self.gate_up = empty_weight(num_experts, 2 * share, hidden_size, place=place)
        self.down = empty_weight(num_experts, hidden_size, share, place=place)

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        cut = self.mesh.cut(self.width, prefix)
        num_experts, hidden_size, share = self.down.shape
        wide, tall = (self.width, hidden_size), (hidden_size, self.width)
        for e in range(num_experts):
            name = f"{prefix}.{e}"
            gate_up, down = self.gate_up.data[e], self.down.data[e]
            yield WeightPart(f"{name}.gate_proj.weight", wide, (cut, WHOLE), gate_up[:share])
            yield WeightPart(f"{name}.up_proj.weight", wide, (cut, WHOLE), gate_up[share:])
            yield WeightPart(f"{name}.down_proj.weight", tall, (WHOLE, cut), down)


class VocabParallel(nn.Module):
    """A [V, H] table cut over tp by rows, as the embedding or as the head. Weight [V / tp, H].

    The vocabulary must divide by tp as it is.
    """

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement):
        super().__init__()
        self.mesh, self.vocab_size = place.mesh, vocab_size
        rows = place.mesh.share(vocab_size, "vocab_size")
        self.weight = empty_weight(rows, hidden_size, place=place)

    def parts(self, name: str) -> Iterator[WeightPart]:
        cut = self.mesh.cut(self.vocab_size, name)
        yield WeightPart(
            name, (self.vocab_size, self.weight.shape[1]), (cut, WHOLE), self.weight.data
        )
