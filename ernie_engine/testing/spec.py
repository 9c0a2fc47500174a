"""What a random checkpoint is like, and what its config.json and generation_config.json say.

Owns the field names of the hub and of transformers 5. Never touches a tensor or a file.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """What to write; the default is a tiny MoE. ValueError if the sizes do not fit together."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None  # None: hidden_size / num_heads
    intermediate_size: int = 256  # of the dense layers
    vocab_size: int = 2048
    tie_embeddings: bool = True
    max_position_embeddings: int = 4096
    dtype: str = "bfloat16"
    num_experts: int = 8  # 0: a dense model
    top_k: int = 2
    moe_intermediate_size: int = 64
    num_shared_experts: int = 1
    omit_shared_field: bool = False  # config.json does not say how many shared experts there are
    first_moe_layer: int = 1
    moe_layer_interval: int = 1
    last_moe_layer: int | None = None  # None: the field is left out
    router_bias_mean: float = 0.0
    router_bias_spread: float = 0.01
    mtp: bool = False  # one multi-token-prediction block
    weight_std: float | None = None  # None: by each matrix's input size
    seed: int = 0
    shards: int = 1
    transformers5_names: bool = False
    tokenizer: bool = True
    thinking: bool = False  # the tokens and the chat template of the Thinking model

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError("hidden_size must be a multiple of num_heads, or head_dim be given")
        if self.head_size % 2:
            raise ValueError("head_dim must be even: rotary embedding turns pairs")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError("top_k must be between 1 and num_experts")
        if self.shards < 1:
            raise ValueError("shards must be at least 1")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError("dtype must be float32, bfloat16 or float16")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def is_moe_layer(self, layer: int) -> bool:
        last = self.last_moe_layer
        last = self.num_layers - 1 if last in (None, -1) else last
        in_range = self.first_moe_layer <= layer <= last
        return self.num_experts > 0 and in_range and (layer + 1) % self.moe_layer_interval == 0


def hub_config(spec: CheckpointSpec) -> dict[str, Any]:
    """The content of config.json."""
    config: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM" if spec.num_experts else "Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5_moe" if spec.num_experts else "ernie4_5",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": spec.tie_embeddings,
        "use_bias": False,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.head_dim is not None or not spec.num_experts:  # a MoE model has no such field
        config["head_dim"] = spec.head_size
    if spec.transformers5_names:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        config |= {"dtype": spec.dtype, "rope_parameters": rope}
    else:
        config |= {"torch_dtype": spec.dtype, "rope_theta": 500000, "rope_scaling": None}
    return config | (_moe_config(spec) if spec.num_experts else {}) | _mtp_config(spec)


def _moe_config(spec: CheckpointSpec) -> dict[str, Any]:
    config = {
        "moe_intermediate_size": spec.moe_intermediate_size,
        "moe_k": spec.top_k,
        "moe_layer_interval": spec.moe_layer_interval,
        "moe_layer_start_index": spec.first_moe_layer,
        "moe_num_experts": spec.num_experts,
    }
    if spec.last_moe_layer is not None:
        config["moe_layer_end_index"] = spec.last_moe_layer
    if not spec.omit_shared_field:
        config["moe_num_shared_experts"] = spec.num_shared_experts
    return config


def _mtp_config(spec: CheckpointSpec) -> dict[str, Any]:
    return {"num_nextn_predict_layers": 1} if spec.mtp else {}


def generation_config(spec: CheckpointSpec) -> dict[str, Any]:
    sampling = {"temperature": 0.6, "top_p": 0.95} if spec.thinking else {"do_sample": True}
    return {
        "temperature": 0.8,
        "top_p": 0.8,
        **sampling,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
