"""Layers that know how their weight is cut over the tp axis: they allocate it, name its parts for
the loader and reduce what was computed with it.

Never imports a kernel (the model brings one) and never reads a file (weights.py does).
A weight's `parts` are the whole truth about loading: see WeightPart.
"""

from collections.abc import Callable, Iterator
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


class GateUpWeight(nn.Module):
    """The matrices of gate and up, their rows cut over tp. What is computed with them is fused with
    what comes before and after.

    Weight [2 * width / tp, in_features]: this rank's share of gate, then that of up.
    """

    def __init__(self, in_features: int, width: int, place: Placement):
        super().__init__()
        self.mesh, self.width = place.mesh, width
        self.share = place.mesh.share(width, "output features")
        self.weight = empty_weight(2 * self.share, in_features, place=place)

    def parts(self, gate: str, up: str) -> Iterator[WeightPart]:
        views = self.weight.data.split(self.share)
        for name, dst in zip((gate, up), views, strict=True):
            cut = self.mesh.cut(self.width, name)
            yield WeightPart(name, (self.width, dst.shape[1]), (cut, WHOLE), dst)


class QKVWeight(nn.Module):
    """The matrix of q, k and v; heads cut over tp, K/V heads replicated when fewer than ranks. What
    is computed with it is fused with what comes before and after.

    Weight [(Hq + 2 Hkv) * D, in_features] with this rank's Hq and Hkv.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        place: Placement,
    ):
        super().__init__()
        mesh = place.mesh
        self.mesh, self.head_dim = mesh, head_dim
        self.total_heads, self.total_kv_heads = num_heads, num_kv_heads
        self.num_heads = mesh.share(num_heads, "attention heads")
        self.num_kv_heads = mesh.share_of_kv_heads(num_kv_heads)
        self.sizes = [n * head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.weight = empty_weight(sum(self.sizes), in_features, place=place)

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
    """The matrices of the routed experts: all of them, each cut along its width I over tp, or with
    expert parallelism this rank's share of them, whole.

    gate_up [E, 2 I / tp, H] (gate rows first), down [E, H, I / tp]; or [E / tp, 2 I, H] and
    [E / tp, H, I], those from `first` on.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, place: Placement):
        super().__init__()
        mesh = place.mesh
        everything = slice(0, num_experts), slice(0, width)
        if mesh.expert_parallel:
            self.experts, self.cut = mesh.cut(num_experts, "moe_num_experts"), everything[1]
        else:
            self.experts, self.cut = everything[0], mesh.cut(width, "moe_intermediate_size")
        self.first, self.width = self.experts.start, width
        num_held, share = (s.stop - s.start for s in (self.experts, self.cut))
        self.gate_up = empty_weight(num_held, 2 * share, hidden_size, place=place)
        self.down = empty_weight(num_held, hidden_size, share, place=place)

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        hidden_size, share = self.down.shape[1:]
        wide, tall, cut = (self.width, hidden_size), (hidden_size, self.width), self.cut
        matrices = zip(self.gate_up.data, self.down.data, strict=True)
        for e, (gate_up, down) in enumerate(matrices, start=self.first):
            name = f"{prefix}.{e}"
            yield WeightPart(f"{name}.gate_proj.weight", wide, (cut, WHOLE), gate_up[:share])
            yield WeightPart(f"{name}.up_proj.weight", wide, (cut, WHOLE), gate_up[share:])
            yield WeightPart(f"{name}.down_proj.weight", tall, (WHOLE, cut), down)


class VocabParallel(nn.Module):
    """A [V, H] table cut over tp by rows, as the embedding or as the head.

    `table` [ceil(V / tp), H] is what kernels read; `weight`, its rows that are in the vocabulary
    (the last ranks may have fewer, or none), what the loader fills. The rest are zeros.
    """

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement):
        super().__init__()
        self.mesh, self.vocab_size = place.mesh, vocab_size
        rows = -(-vocab_size // self.mesh.tp_size)
        self.first = self.mesh.tp_rank * rows
        self.num_held = max(0, min(rows, vocab_size - self.first))
        self.table = empty_weight(rows, hidden_size, place=place).data
        self.table[self.num_held :] = 0
        self.weight = nn.Parameter(self.table[: self.num_held], requires_grad=False)

    def look_up(self, ids: Tensor, embedding: Linear) -> Tensor:
        """ids [T] -> rows [T, H]."""
        if self.mesh.tp_size == 1:
            return embedding(ids, self.table)
        local = ids - self.first
        held = (local >= 0) & (local < len(self.table))
        # Not where(held, 0): it copies the 0 to the device, which a graph cannot hold.
        rows = embedding(local.masked_fill(~held, 0), self.table).masked_fill(~held[:, None], 0)
        return comm.all_reduce(rows, self.mesh)

    def logits(self, x: Tensor, head: Linear) -> Tensor:
        """x [R, H] -> [R, V] on every rank."""
        return comm.all_gather_last(head(x, self.table), self.mesh)[:, : self.vocab_size]

    def parts(self, name: str) -> Iterator[WeightPart]:
        if self.num_held:
            cut, shape = slice(self.first, self.first + self.num_held), self.weight.shape
            yield WeightPart(name, (self.vocab_size, shape[1]), (cut, WHOLE), self.weight.data)
