"""What the hardware must do at least for a step: bytes to read and operations to compute.

Arithmetic from a model's config alone, for unquantised weights. Counts weights, K/V
and the vocabulary head; norms, activations and what is written are left out, so it stays a floor.
"""

from dataclasses import dataclass

from ernie_engine.config import ModelConfig

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ROUTER_ITEMSIZE = 4  # fp32, whatever the model's dtype


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do."""

    bytes_per_s: float
    flops_per_s: float

    def of_ranks(self, tp: int) -> "Ceilings":
        """Of tp devices that share every layer; pipeline stages take turns and add nothing."""
        return Ceilings(tp * self.bytes_per_s, tp * self.flops_per_s)


@dataclass(frozen=True)
class Work:
    """Bytes read and floating-point operations (a multiply-add counts as two)."""

    num_bytes: float
    flops: float

    def bound(self, ceilings: Ceilings) -> str:
        """What it is that cannot go faster: "memory" or "compute"."""
        memory = self.num_bytes / ceilings.bytes_per_s
        return "memory" if memory >= self.flops / ceilings.flops_per_s else "compute"

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bytes_per_s, self.flops / ceilings.flops_per_s)


def decode_work(config: ModelConfig, batch: int, context: float, itemsize: int) -> Work:
    """One step of `batch` sequences, one token each, `context` tokens of K/V each on average."""
    kv_bytes = batch * context * kv_bytes_per_token(config, itemsize)
    flops = batch * (_flops_per_token(config) + _head_flops(config))
    flops += batch * context * _attention_flops_per_pair(config)
    return Work(weight_bytes(config, batch, itemsize) + kv_bytes, flops)


def prefill_work(
    config: ModelConfig, batch: int, prompt_len: int, itemsize: int, cached_len: int = 0
) -> Work:
    """`batch` prompts, behind `cached_len` tokens each that are in the K/V cache, each answered by
    one token; weights are read once."""
    num_tokens = batch * prompt_len
    pairs = num_tokens * (cached_len + (prompt_len + 1) / 2)
    flops = num_tokens * _flops_per_token(config) + batch * _head_flops(config)
    flops += pairs * _attention_flops_per_pair(config)
    cached_bytes = batch * cached_len * kv_bytes_per_token(config, itemsize)
    return Work(weight_bytes(config, num_tokens, itemsize) + cached_bytes, flops)


def mean_context(prompt_len: int, num_tokens: int) -> float:
    """Tokens of K/V that a sequence has, on average over the steps that draw its tokens from the
    second on."""
    return prompt_len + num_tokens / 2


def generation_seconds(
    config: ModelConfig, batch: int, prompt_len: int, num_tokens: int, dtype: str, ceil: Ceilings
) -> float:
    """At least: `batch` prompts read at once, then answered together by num_tokens each."""
    itemsize = DTYPE_BYTES[dtype]
    context = mean_context(prompt_len, num_tokens)
    step = decode_work(config, batch, context, itemsize).seconds(ceil)
    return prefill_work(config, batch, prompt_len, itemsize).seconds(ceil) + (num_tokens - 1) * step


def weight_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> float:
    """The weights that a step of `num_tokens` tokens touches, head included."""
    num_moe = _num_moe_layers(config)
    experts = num_moe * expected_experts(config, num_tokens) * _expert_params(config)
    router = num_moe * config.moe_num_experts * config.hidden_size * ROUTER_ITEMSIZE
    head = config.vocab_size * config.hidden_size
    return itemsize * (_always_read_params(config) + experts + head) + router


def expected_experts(config: ModelConfig, num_tokens: int) -> float:
    """Distinct experts of a layer that balanced routing sends `num_tokens` tokens to."""
    experts = config.moe_num_experts
    return experts * (1 - (1 - config.moe_k / experts) ** num_tokens) if experts else 0.0


def kv_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * itemsize


def _always_read_params(config: ModelConfig) -> int:
    """Attention, dense MLPs and shared experts of all layers."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q, o; k, v
    attention = config.num_hidden_layers * heads * config.head_dim * config.hidden_size
    num_moe = _num_moe_layers(config)
    num_dense = config.num_hidden_layers - num_moe
    dense = num_dense * 3 * config.intermediate_size * config.hidden_size
    return attention + dense + num_moe * config.moe_num_shared_experts * _expert_params(config)


def _flops_per_token(config: ModelConfig) -> float:
    """Without attention over the context and without the head."""
    num_moe = _num_moe_layers(config)
    routed = num_moe * config.moe_k * _expert_params(config)
    router = num_moe * config.moe_num_experts * config.hidden_size
    return 2 * (_always_read_params(config) + routed + router)


def _attention_flops_per_pair(config: ModelConfig) -> float:
    """One query token against one token of context, all layers: q.k and weight times v."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def _head_flops(config: ModelConfig) -> float:
    return 2 * config.vocab_size * config.hidden_size


def _expert_params(config: ModelConfig) -> int:
    return 3 * config.moe_intermediate_size * config.hidden_size


def _num_moe_layers(config: ModelConfig) -> int:
    return sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
