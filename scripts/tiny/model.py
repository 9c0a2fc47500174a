"""The model that is trained: transformers' Ernie4_5_MoeForCausalLM and, beside it, the MTP block.

Owns their sizes, initial weights, the training form of the experts, and the rule of the router's
correction bias. Never writes files.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeDecoderLayer,
    Ernie4_5_MoeRMSNorm,
    Ernie4_5_MoeTopKRouter,
)

from .settings import MAX_PARAMETERS, Settings

EVERY_EXPERT = "every_expert"  # name of the training form in transformers' register


def every_expert_forward(
    experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Routed experts as two large GEMMs: all experts for all tokens, unchosen ones weighted by 0.

    hidden [T, H], index and weights [T, k] -> [T, H]. Four times the multiplications of the chosen
    experts alone, but no sorting, gathering or scattering, and the same sums on every device.
    The weight is applied before `down_proj`, which is linear: the same value up to rounding.
    """
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    num_experts, _, width = down.shape
    weights = hidden.new_zeros(len(hidden), num_experts)  # [T, E]
    weights = weights.scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gated = nn.functional.linear(hidden, gate_up.flatten(0, 1))  # [T, E * 2I]
    gate, up = gated.view(-1, num_experts, 2, width).unbind(2)
    activated = nn.functional.silu(gate) * up * weights[..., None]  # [T, E, I]
    return activated.flatten(1) @ down.transpose(1, 2).flatten(0, 1)


ALL_EXPERTS_FUNCTIONS.register(EVERY_EXPERT, every_expert_forward)


def make_config(settings: Settings, vocab_size: int) -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden,
        intermediate_size=settings.dense_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        moe_intermediate_size=settings.expert_width,
        moe_k=settings.top_k,
        moe_num_experts=settings.experts,
        moe_num_shared_experts=settings.shared_experts,
        moe_layer_start_index=1,
    )


class MtpBlock(nn.Module):
    """Multi-token prediction, depth 1: from h_t and token t+1 to token t+2, slot t at position t.

    Parameter names are the hub's after `model.`. `u = proj([norm(emb(token t+1)), norm(h_t)])`, a
    dense decoder layer, then the target's own final norm and head. h_t is taken after that norm.
    """

    def __init__(self, config: Ernie4_5_MoeConfig):
        super().__init__()
        width = config.hidden_size
        norms = [Ernie4_5_MoeRMSNorm(width, config.rms_norm_eps) for _ in range(2)]
        self.mtp_block = nn.ModuleList([Ernie4_5_MoeDecoderLayer(config, layer_idx=0)])
        self.mtp_emb_norm = nn.ModuleList(norms[:1])
        self.mtp_hidden_norm = nn.ModuleList(norms[1:])
        self.mtp_linear_proj = nn.ModuleList([nn.Linear(2 * width, width, bias=False)])

    def forward(
        self, hidden: Tensor, next_embedding: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """hidden (after the final norm), next_embedding [B, T, H] -> [B, T, H] before that norm."""
        halves = (self.mtp_emb_norm[0](next_embedding), self.mtp_hidden_norm[0](hidden))
        merged = self.mtp_linear_proj[0](torch.cat(halves, dim=-1))
        return self.mtp_block[0](merged, attention_mask=mask, position_embeddings=rotary)


class TinyModel(nn.Module):
    """A target and its MTP block. `fresh` draws weights, `checkpoint.load` reads them."""

    def __init__(self, target: Ernie4_5_MoeForCausalLM):
        super().__init__()
        self.target = target
        self.mtp = MtpBlock(target.config)
        assert self.num_parameters() <= MAX_PARAMETERS, self.num_parameters()

    @staticmethod
    def fresh(config: Ernie4_5_MoeConfig, seed: int, dtype: torch.dtype) -> "TinyModel":
        """Weights drawn from the seed, rounded to `dtype` but for the router."""
        model = TinyModel(Ernie4_5_MoeForCausalLM(config))
        model.target.config._experts_implementation = EVERY_EXPERT
        _initialise(model, config.num_hidden_layers, torch.Generator().manual_seed(seed))
        for name, parameter in model.named_parameters():
            if not is_router(name):
                parameter.data = parameter.data.to(dtype)
        return model

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def dtype(self) -> torch.dtype:
        return self.target.model.embed_tokens.weight.dtype

    def routers(self) -> Iterator[Ernie4_5_MoeTopKRouter]:
        return (m for m in self.target.modules() if isinstance(m, Ernie4_5_MoeTopKRouter))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, positions [B, T] and additive mask [B, 1, T, T] -> two logits, each [B, T, V].

        The first are of the token at t+1, the second of t+2; these mean nothing in the last slot.
        """
        body = self.target.model
        out = body(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden = out.last_hidden_state
        next_embedding = body.embed_tokens(tokens.roll(-1, dims=1))
        rotary = body.rotary_emb(hidden, positions)
        drafted = self.mtp(hidden, next_embedding, rotary, mask)
        return self.target.lm_head(hidden), self.target.lm_head(body.norm(drafted))


def is_router(name: str) -> bool:
    """Whether a parameter stays float32: router weight and correction bias."""
    return ".mlp.gate." in name


def _initialise(model: TinyModel, num_layers: int, generator: torch.Generator) -> None:
    """Matrices at 1/sqrt(fan-in), those that write to the residual stream smaller with depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "e_score_correction_bias" in name:
            continue
        std = 1 / math.sqrt(parameter.shape[-1])
        if "embed_tokens" in name or is_router(name):
            std = 0.02
        elif "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * num_layers)
        nn.init.normal_(parameter, std=std, generator=generator)


class RouterBalance:
    """A correction bias with a real spread, its slow rule, and the loss that balances around it.

    Each layer's bias starts as a seeded order of evenly spaced values within +-`spread`. After
    every step each expert's bias moves by `rate` towards an even load (Wang et al.,
    "Auxiliary-loss-free load balancing strategy for MoE", 2024). With a small rate the bias stays
    near its start and the router learns around it, drawn to even loads by the usual loss (Switch
    Transformer, eq. 4): the trained model then needs its bias, but the experts of the highest bias
    take most of the load.
    """

    def __init__(self, model: TinyModel, spread: float, seed: int):
        self.biases = [router.moe_statics.e_score_correction_bias for router in model.routers()]
        self.loads = [torch.zeros_like(bias) for bias in self.biases]  # tokens of this step, [1, E]
        self.last_loads = torch.zeros(len(self.biases), self.biases[0].shape[1])
        self.losses: list[Tensor] = []  # of this step's layers
        generator = torch.Generator().manual_seed(seed)
        for router, bias, load in zip(model.routers(), self.biases, self.loads, strict=True):
            order = torch.randperm(bias.shape[1], generator=generator)
            bias.data[0] = torch.linspace(-spread, spread, len(order))[order].to(bias)
            router.register_forward_hook(self._watcher(load))

    def _watcher(self, load: Tensor):
        def watch(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if module.training:
                logits, _, chosen = output
                experts = torch.arange(load.shape[1], device=load.device)
                counts = (chosen.reshape(-1, 1) == experts).sum(0)
                load.add_(counts)
                share = counts / chosen.numel()  # [E], sums to 1
                self.losses.append(len(share) * (share * logits.softmax(-1).mean(0)).sum())

        return watch

    def loss(self) -> Tensor:
        """Balance loss of the last forward, summed over layers; 1 a layer where all is even."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.last_loads = torch.cat(self.loads)
        for bias, load in zip(self.biases, self.loads, strict=True):
            bias += rate * (load.mean() - load).sign()
            load.zero_()

    def imbalance(self) -> float:
        """Largest load of an expert over the mean, in the worst layer of the last step."""
        return float((self.last_loads.amax(1) / self.last_loads.mean(1)).max())
