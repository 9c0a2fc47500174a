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
from ernie_engine.model.moe import MLP, MoE, RMSNorm
from ernie_engine.parallel.layers import (
    QKVWeight,
    RowParallelLinear,
    VocabParallel,
    WeightPart,
    whole_part,
)
from ernie_engine.parallel.mesh import Placement


class Attention(nn.Module):
    """Causal grouped-query attention over the rows' paged context."""

    def __init__(self, config: ModelConfig, ops: Ops, place: Placement, index: int, rope: Tensor):
        super().__init__()
        self.ops, self.index, self.rope = ops, index, rope  # of the rank's layers in the cache
        heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        self.scale = head_dim**-0.5
        self.qkv_proj = QKVWeight(hidden, heads, config.num_key_value_heads, head_dim, place)
        self.o_proj = RowParallelLinear(heads * head_dim, hidden, place, ops.linear)

    def forward(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, batch: ForwardBatch, kv: KVCache
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, H] -> attention of norm(residual + x) [T, H], residual + x."""
        cache = kv.layer(self.index)
        q, hidden = self.ops.norm_qkv_rope(
            *(x, residual, norm.weight, norm.eps, self.qkv_proj.weight),
            *(self.rope, batch.positions, *cache, batch.cache_slots),
        )
        return self.o_proj(self._attend(q, batch, *cache).flatten(1)), hidden

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
    """`layer` counts all of the model's, `index` this rank's."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        place: Placement,
        layer: int,
        index: int,
        rope: Tensor,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(config, place)
        self.self_attn = Attention(config, ops, place, index, rope)
        self.post_attention_layernorm = RMSNorm(config, place)
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, ops, place)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, ops, place)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, kv: KVCache
    ) -> tuple[Tensor, Tensor]:
        x, hidden = self.self_attn(x, residual, self.input_layernorm, batch, kv)
        return self.mlp(x, hidden, self.post_attention_layernorm)

    def parts(self, prefix: str) -> Iterator[WeightPart]:
        norms = "input_layernorm", "post_attention_layernorm"
        yield from self.self_attn.parts(f"{prefix}.self_attn")
        yield from self.mlp.parts(f"{prefix}.mlp")
        for name in norms:
            yield whole_part(f"{prefix}.{name}.weight", getattr(self, name).weight)


class Ernie(nn.Module):
    """A pipeline stage of the decoder, or all of it: the given layers under their global names.

    The first stage looks tokens up, the last has the final norm and the head; with a tied head
    both hold the embedding. forward() gives the hidden stream after the layers, logits() those of
    chosen rows of the last stage's.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        place: Placement,
        max_model_len: int,
        layers: range | None = None,
    ):
        super().__init__()
        self.ops, self.tied, self.pulse = ops, config.tie_word_embeddings, place.mesh.pulse
        self.vocab_size = config.vocab_size
        self.layer_ids = layers = range(config.num_hidden_layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == config.num_hidden_layers
        rope = rope_table(max_model_len, config.head_dim, config.rope_theta, place.device)
        table = config.vocab_size, config.hidden_size, place
        self.embed = VocabParallel(*table) if first or (last and self.tied) else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, ops, place, layer, layer - layers.start, rope) for layer in layers
        )
        self.norm = RMSNorm(config, place) if last else None
        self.lm_head = VocabParallel(*table) if last and not self.tied else None

    def forward(self, batch: ForwardBatch, kv: KVCache, stream: Tensor | None) -> Tensor:
        """`stream` [T, H]: what the stage before gave; None in the first -> [T, H]."""
        if stream is None:
            assert self.embed is not None
            stream = self.embed.look_up(batch.input_ids, self.ops.embedding)
        x, residual = stream, None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, kv)
            self.pulse.beat()
        return x if residual is None else residual + x  # as the next norm would add them

    @property
    def is_last(self) -> bool:
        """Is this the last stage?"""
        return self.norm is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of the last stage's forward() [R, H] -> logits [R, V] fp32, on every rank of it."""
        head = self.embed if self.tied else self.lm_head
        assert self.norm is not None and head is not None, "only the last stage has logits"
        x = self.ops.rms_norm(hidden, self.norm.weight, self.norm.eps)
        return head.logits(x, self.ops.vocab_head)

    def parts(self) -> Iterator[WeightPart]:
        """Where each checkpoint tensor of these layers goes, under the hub's names."""
        if self.embed is not None:
            yield from self.embed.parts("model.embed_tokens.weight")
        for i, layer in zip(self.layer_ids, self.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            yield from layer.parts(f"model.layers.{i}")
        if self.norm is not None:
            yield whole_part("model.norm.weight", self.norm.weight)
        if self.lm_head is not None:
            yield from self.lm_head.parts("lm_head.weight")
