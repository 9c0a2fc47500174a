"""The ERNIE-4.5 decoder, dense and mixture of experts: attention, layer, model.

Reads like the paper: pre-norm, the residual beside x, interleaved RoPE, grouped-query attention
over a paged cache. Sees neither queue nor socket; everything comes by argument.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ernie_engine.config import ModelConfig
from ernie_engine.kernels.registry import Ops
from ernie_engine.kernels.rope import rope_table
from ernie_engine.model.batch import ForwardBatch
from ernie_engine.model.kv_cache import KVCache
from ernie_engine.model.moe import MLP, MoE
from ernie_engine.parallel.comm import all_gather_last
from ernie_engine.parallel.layers import (
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallel,
    WeightPart,
    empty_weight,
    whole_part,
)
from ernie_engine.parallel.mesh import Placement


class RMSNorm(nn.Module):
    """Root-mean-square norm, after adding x to the residual if there is one."""

    def __init__(self, config: ModelConfig, ops: Ops, place: Placement):
        super().__init__()
        self.ops, self.eps = ops, config.rms_norm_eps
        self.weight = empty_weight(config.hidden_size, place=place)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] -> norm(residual + x), residual + x."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention over the rows' paged context."""

    def __init__(self, config: ModelConfig, ops: Ops, place: Placement, layer: int, rope: Tensor):
        super().__init__()
        self.ops, self.layer, self.rope = ops, layer, rope
        heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        self.scale = head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            hidden, heads, config.num_key_value_heads, head_dim, place, ops.linear
        )
        self.o_proj = RowParallelLinear(heads * head_dim, hidden, place, ops.linear)

    def forward(self, x: Tensor, batch: ForwardBatch, kv: KVCache) -> Tensor:  # [T, H] -> [T, H]
        q, k, v = self.qkv_proj(x)
        cache = kv.layer(self.layer)
        q = self.ops.rope_and_cache(q, k, v, self.rope, batch.positions, *cache, batch.cache_slots)
        return self.o_proj(self._attend(q, batch, *cache).flatten(1))

    def _attend(self, q: Tensor, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Rows of one query token and longer rows go to kernels of their own."""
        pieces = q.tensor_split([batch.num_decode_tokens])
        kernels = self.ops.decode_attention, self.ops.prefill_attention
        out = []
        both = zip(pieces, kernels, (batch.decode, batch.prefill), strict=True)
        for queries, attend, rows in both:
            if rows is not None:
                *where, longest = rows
                out.append(attend(queries, k_cache, v_cache, *where, self.scale, longest))
        return out[0] if len(out) == 1 else torch.cat(out)

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        yield from self.qkv_proj.parts(*(f"{prefix}.{name}_proj.weight" for name in "qkv"))
        yield from self.o_proj.parts(f"{prefix}.o_proj.weight")


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, place: Placement, layer: int, rope: Tensor):
        super().__init__()
        self.input_layernorm = RMSNorm(config, ops, place)
        self.self_attn = Attention(config, ops, place, layer, rope)
        self.post_attention_layernorm = RMSNorm(config, ops, place)
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, ops, place)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, ops, place)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, kv: KVCache
    ) -> tuple[Tensor, Tensor]:
        x, hidden = self.input_layernorm(x, residual)
        x = self.self_attn(x, batch, kv)
        x, hidden = self.post_attention_layernorm(x, hidden)
        return self.mlp(x), hidden

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        norms = "input_layernorm", "post_attention_layernorm"
        yield from self.self_attn.parts(f"{prefix}.self_attn")
        yield from self.mlp.parts(f"{prefix}.mlp")
        for name in norms:
            yield whole_part(f"{prefix}.{name}.weight", getattr(self, name).weight)


class Ernie(nn.Module):
    """The whole decoder: forward() to the last hidden state, logits() from chosen rows of it."""

    def __init__(self, config: ModelConfig, ops: Ops, place: Placement, max_model_len: int):
        super().__init__()
        self.ops, self.mesh = ops, place.mesh
        rope = rope_table(max_model_len, config.head_dim, config.rope_theta, place.device)
        self.embed = VocabParallel(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(
            DecoderLayer(config, ops, place, layer, rope)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config, ops, place)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else VocabParallel(config.vocab_size, config.hidden_size, place)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:  # -> [T, H], before the norm
        x, residual = self.ops.embedding(batch.input_ids, self.embed.weight), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, kv)
        return x if residual is None else residual + x

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of forward()'s result [R, H] -> logits [R, V] fp32, on every rank."""
        x, _ = self.norm(hidden, None)
        head = self.embed if self.lm_head is None else self.lm_head
        return all_gather_last(self.ops.vocab_head(x, head.weight), self.mesh)

    def parts(self) -> Iterator[WeightPart]:
        """Where every checkpoint tensor goes, under the hub's names."""
        yield from self.embed.parts("model.embed_tokens.weight")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.parts(f"model.layers.{i}")
        yield whole_part("model.norm.weight", self.norm.weight)
        if self.lm_head is not None:
            yield from self.lm_head.parts("lm_head.weight")
