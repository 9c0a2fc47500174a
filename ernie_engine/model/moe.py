"""The feed-forward half of a layer: dense MLP, and mixture of experts with shared ones.

The router is fp32 from its input to its weights, as the model was trained. Never sees a queue or
a file; kernels come as `ops`, cuts are made by parallel/.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ernie_engine.config import ModelConfig
from ernie_engine.kernels.registry import Ops
from ernie_engine.parallel.comm import all_reduce
from ernie_engine.parallel.layers import (
    ExpertWeights,
    GateUpWeight,
    RowParallelLinear,
    WeightPart,
    empty_weight,
    whole_part,
)
from ernie_engine.parallel.mesh import Placement


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm; what follows the norm is fused with it."""

    def __init__(self, config: ModelConfig, place: Placement):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = empty_weight(config.hidden_size, place=place)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layers; of the shared experts the weights alone."""

    def __init__(self, hidden_size: int, width: int, ops: Ops, place: Placement):
        super().__init__()
        self.ops = ops
        self.gate_up_proj = GateUpWeight(hidden_size, width, place)
        self.down_proj = RowParallelLinear(width, hidden_size, place, ops.linear)

    def forward(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] -> MLP of norm(residual + x) [T, H], residual + x."""
        weight = self.gate_up_proj.weight
        y, hidden = self.ops.norm_swiglu(x, residual, norm.weight, norm.eps, weight)
        return self.down_proj(y), hidden

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.gate_up_proj.parts(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        yield from self.down_proj.parts(f"{prefix}.down_proj.weight")


class Router(nn.Module):
    """Which experts a token goes to: the bias takes part in the choice, not in the weights."""

    def __init__(self, config: ModelConfig, place: Placement):
        super().__init__()
        self.top_k, self.norm_min = config.moe_k, config.moe_norm_min
        shape = config.moe_num_experts, config.hidden_size
        self.weight = empty_weight(*shape, place=place, dtype=torch.float32)
        self.bias = empty_weight(shape[0], place=place, dtype=torch.float32)

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        yield whole_part(f"{prefix}.gate.weight", self.weight)
        name = f"{prefix}.moe_statics.e_score_correction_bias"
        yield whole_part(name, self.bias, shape=(1, len(self.bias)))


class MoE(nn.Module):
    """The chosen experts' weighted sum, plus the shared experts (one MLP) if there are any."""

    def __init__(self, config: ModelConfig, ops: Ops, place: Placement):
        super().__init__()
        self.ops, self.mesh = ops, place.mesh
        hidden_size, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config, place)
        self.experts = ExpertWeights(config.moe_num_experts, hidden_size, width, place)
        shared_width = width * config.moe_num_shared_experts
        self.shared_experts = None
        if shared_width:
            self.shared_experts = MLP(hidden_size, shared_width, ops, place)

    def forward(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] -> experts of norm(residual + x) [T, H], residual + x."""
        gate, experts, shared = self.gate, self.experts, self.shared_experts
        of_shared = (shared.gate_up_proj.weight, shared.down_proj.weight) if shared else ()
        y, hidden = self.ops.norm_moe(
            *(x, residual, norm.weight, norm.eps),
            *(gate.weight, gate.bias, gate.top_k, gate.norm_min),
            *(experts.gate_up, experts.down, experts.first, *of_shared),
        )
        return all_reduce(y, self.mesh), hidden  # one for the routed and the shared

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.gate.parts(prefix)
        yield from self.experts.parts(f"{prefix}.experts")
        if self.shared_experts is not None:
            yield from self.shared_experts.parts(f"{prefix}.shared_experts")
