"""What a model is: ModelConfig, read from the config.json of a checkpoint.

Owns the names of that file (hub and transformers 5) and every check of its values: what would
change the answers and is not understood is an error. Never imports torch, never opens a weight
file; a config is never written after it was made.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by hub name

_RENAMED = {
    "torch_dtype": "dtype",
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_k",
    "eos_token_id": "eos_token_ids",
}
_MOE_SIZES = ("moe_num_experts", "moe_k", "moe_intermediate_size")
_ONLY = {  # what would change the answers, with the only value that is implemented
    **{"hidden_act": "silu", "moe_gate_act": "softmax", "rope_type": "default"},
    **dict.fromkeys(("use_bias", "attention_bias", "mlp_bias", "use_sliding_window"), False),
    **dict.fromkeys(("compression_ratio", "partial_rotary_factor", "routed_scaling_factor"), 1),
    **dict.fromkeys(("rope_scaling", "quantization_config", "sliding_window"), None),
    "use_rmsnorm": True,
}
_IGNORED = (  # of training, of other implementations, or transformers' book-keeping
    "architectures auto_map transformers_version paddlenlp_version _attn_implementation "
    "_name_or_path use_cache initializer_range return_dict output_* chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type use_moe moe_gate moe_capacity "
    "moe_use_aux_free moe_norm_gate_logits moe_*_loss_lambda moe_group moe_all_to_all_dropout "
    "sinkhorn_* *_dropout_prob weight_share_add_bias freq_allocation multi_token_pred_lambda "
    "ignored_index use_flash_attention fuse_* router_aux_loss_coef"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An ERNIE-4.5 text model: dense (moe_num_experts == 0) or MoE. ValueError on a bad value."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of the dense layers
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str  # of the weights; the router is fp32 whatever this says
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int = 0
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0  # of one expert
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = -1  # inclusive
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int = 0

    def is_moe_layer(self, layer_index: int) -> bool:
        inside = self.moe_layer_start_index <= layer_index <= self.moe_layer_end_index
        on_beat = (layer_index + 1) % self.moe_layer_interval == 0
        return self.moe_num_experts > 0 and inside and on_beat

    @classmethod
    def from_folder(cls, folder: Path, tensor_shapes: Shapes | None = None) -> "ModelConfig":
        """`from_dict` of the folder's config.json."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        try:
            return cls.from_dict(raw, tensor_shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], tensor_shapes: Shapes | None = None
    ) -> "ModelConfig":
        """Read a config.json's contents, hub or transformers 5 names; null counts as absent.

        `tensor_shapes` settles what they may leave open: the number of shared experts by the width
        of their tensors (none: 0), a tied head by the absence of lm_head.weight. Without it (dummy
        weights) these are 0 and, as in transformers, tied.
        """
        values = _by_field(raw)
        moe = _check_supported(values)
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        needed |= {*_MOE_SIZES, "moe_layer_start_index", "moe_layer_interval"} if moe else set()
        missing = needed - {"head_dim", "tie_word_embeddings"} - set(values)
        if missing:
            raise ValueError(f"required fields are missing, add them: {', '.join(sorted(missing))}")
        _check_integers(values)
        if moe and "moe_num_shared_experts" not in values:
            width = values["moe_intermediate_size"]
            values["moe_num_shared_experts"] = _count_shared_experts(tensor_shapes or {}, width)
        values.setdefault("tie_word_embeddings", "lm_head.weight" not in (tensor_shapes or {}))
        values |= _derived(values)
        known = {f.name for f in fields(cls) if moe or not f.name.startswith("moe_")}
        return cls(**{name: value for name, value in values.items() if name in known})

    def __post_init__(self) -> None:
        _check_integers(vars(self))
        for name in ("rms_norm_eps", "rope_theta", "moe_norm_min"):
            value = getattr(self, name)
            ok = type(value) in (int, float) and 0 < value < math.inf
            _check(ok, name, value, "must be a positive finite number")
        for name in ("bos_token_id", "pad_token_id", "eos_token_ids"):
            value = getattr(self, name)
            ids = value if name == "eos_token_ids" else (value,)
            ok = len(ids) > 0 and all(type(i) is int and 0 <= i < self.vocab_size for i in ids)
            _check(ok, name, value, f"token ids lie in [0, vocab_size={self.vocab_size})")
        tied, dtypes = self.tie_word_embeddings, ("bfloat16", "float16", "float32")
        _check(type(tied) is bool, "tie_word_embeddings", tied, "must be true or false")
        _check(self.dtype in dtypes, "dtype", self.dtype, f"use one of {', '.join(dtypes)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        remedy = f"must be a multiple of num_key_value_heads={kv_heads}"
        _check(heads % kv_heads == 0, "num_attention_heads", heads, remedy)
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: RoPE turns pairs")
        remedy = f"must be at most moe_num_experts={self.moe_num_experts}"
        _check(self.moe_k <= self.moe_num_experts, "moe_k", self.moe_k, remedy)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names the file if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        remedy = "give a checkpoint folder as the hub has it"
        raise ValueError(f"cannot read {path} ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: download it again")
    return value


def _check(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: {remedy}")


def _check_integers(values: Mapping[str, Any]) -> None:
    """Each integer that is there is at least its default, or 1 where it has none."""
    moe_sizes = _MOE_SIZES if values["model_type"] == "ernie4_5_moe" else ()
    for field in fields(ModelConfig):
        if field.type is int and field.name in values and not field.name.endswith("_token_id"):
            default = 1 if field.default is MISSING else field.default
            least = 1 if field.name in moe_sizes else default
            value = values[field.name]
            ok = type(value) is int and value >= least
            _check(ok, field.name, value, f"must be one integer, {least} or more")


def _by_field(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null, under ModelConfig's names, with rope_parameters laid flat."""
    rope: Mapping[str, Any] = raw.get("rope_parameters") or {}
    ok = isinstance(rope, Mapping) and not set(rope) - {"rope_type", "rope_theta"}
    _check(ok, "rope_parameters", rope, "only rope_type 'default' with a rope_theta is supported")
    values: dict[str, Any] = {}
    for name, value in [*raw.items(), *rope.items()]:
        name = _RENAMED.get(name, name)
        if value is None or name == "rope_parameters":
            continue
        if name in values and values[name] != value:
            raise ValueError(f"{name} is given as {values[name]!r} and as {value!r}: keep one")
        values[name] = value
    return values


def _check_supported(values: Mapping[str, Any]) -> bool:
    """Refuse what would give wrong answers, log what is unknown; whether the model is MoE."""
    model_type, experts = values.get("model_type"), values.get("moe_num_experts", 0)
    ok = model_type in ("ernie4_5", "ernie4_5_moe")
    _check(ok, "model_type", model_type, "only ernie4_5 and ernie4_5_moe (text) are supported")
    for name, only in _ONLY.items():
        remedy = f"only {only!r} is supported; use a checkpoint without it"
        _check(values.get(name, only) == only, name, values.get(name), remedy)
    moe = model_type == "ernie4_5_moe"
    _check(moe or experts == 0, "moe_num_experts", experts, "must be 0 for model_type ernie4_5")
    known = [*_ONLY, *_IGNORED.split(), *(field.name for field in fields(ModelConfig))]
    unknown = [n for n in values if not any(fnmatchcase(n, pattern) for pattern in known)]
    if unknown:
        log.warning("config.json: unknown fields are ignored: %s", ", ".join(unknown))
    return moe


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose value in config.json is absent, a code, or of another type."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    remedy = f"must be a multiple of num_attention_heads={heads} where head_dim is absent"
    _check("head_dim" in values or hidden % heads == 0, "hidden_size", hidden, remedy)
    eos, moe_end = values["eos_token_ids"], values.get("moe_layer_end_index", -1)
    return {
        "head_dim": values.get("head_dim", hidden // heads),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "moe_layer_end_index": values["num_hidden_layers"] - 1 if moe_end == -1 else moe_end,
    }


def _count_shared_experts(shapes: Shapes, width: int) -> int:
    """All shared experts of a layer are one MLP: its width tells their number."""
    end = ".mlp.shared_experts.gate_proj.weight"
    widths = {s[0] for name, s in shapes.items() if name.endswith(end) and len(s) == 2}
    total = max(widths, default=0)
    ok = len(widths) <= 1 and total % width == 0
    remedy = f"absent, and the tensors' widths {sorted(widths)} do not tell it: add it"
    _check(ok, "moe_num_shared_experts", None, remedy)
    return total // width
