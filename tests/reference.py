"""Random ERNIE-4.5 checkpoints written by transformers, and its answers to compare with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
)

DENSE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MOE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Geometry:
    """A random model: its config, its router bias, fields of config.json to leave out."""

    config: dict[str, Any]
    dense: bool = False
    bias_mean: float = 0.0
    bias_spread: float = 0.1
    omit: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def geometry(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}


GEOMETRIES = {
    "dense, q width != hidden": Geometry(DENSE, dense=True),
    "dense, untied, one kv head": Geometry(
        geometry(DENSE, tie_word_embeddings=False, num_key_value_heads=1), dense=True
    ),
    "moe, two shared experts": Geometry(MOE),
    "moe, no shared experts, untied": Geometry(
        geometry(MOE, moe_num_shared_experts=0, tie_word_embeddings=False)
    ),
    "moe, field for shared experts absent": Geometry(
        geometry(MOE, moe_num_shared_experts=0), omit=("moe_num_shared_experts",)
    ),
    "moe, shared experts known by tensors only": Geometry(MOE, omit=("moe_num_shared_experts",)),
    "one kv head": Geometry(geometry(MOE, num_key_value_heads=1)),
    "first moe layer 0, interval 2": Geometry(
        geometry(MOE, moe_layer_start_index=0, moe_layer_interval=2)
    ),
    "first moe layer 3, top-1": Geometry(geometry(MOE, moe_layer_start_index=3, moe_k=1)),
    "all experts, last moe layer 2": Geometry(geometry(MOE, moe_k=8, moe_layer_end_index=2)),
    "odd vocabulary": Geometry(geometry(MOE, vocab_size=331, tie_word_embeddings=False)),
    "large router bias": Geometry(MOE, bias_mean=20.0, bias_spread=0.02),
}


def write_reference(folder: Path, shape: Geometry, dtype: torch.dtype, seed: int = 0) -> Path:
    """A random checkpoint in hub format; the router decides, biases change its choice."""
    torch.manual_seed(seed)
    scale = 0.5 / shape.config["hidden_size"] ** 0.5
    config_class = Ernie4_5Config if shape.dense else Ernie4_5_MoeConfig
    model_class = Ernie4_5ForCausalLM if shape.dense else Ernie4_5_MoeForCausalLM
    config = config_class(**{"initializer_range": 2 * scale, **shape.config})
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=2 * scale)
        elif name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(parameter, mean=shape.bias_mean, std=shape.bias_spread)
        else:
            parameter.data = parameter.data.to(dtype)
            if "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw |= {"dtype": str(dtype).removeprefix("torch."), **shape.extra}
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in shape.omit}))
    return folder


def load_reference(folder: Path, shape: Geometry, dtype: torch.dtype):
    """transformers' model; what config.json leaves out is said here, as its defaults differ."""
    said = {name: shape.config[name] for name in shape.omit}
    if dtype == torch.float64:
        said["experts_implementation"] = "eager"  # the grouped product has no fp64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **said).eval()


@torch.no_grad()
def greedy(model, prompt: Sequence[int], num_tokens: int) -> list[int]:
    model.generation_config.eos_token_id = None  # the length alone ends it
    ids = torch.tensor([list(prompt)], device=model.device)
    seen = torch.ones_like(ids)  # or generate() would take token 0 for padding
    out = model.generate(ids, attention_mask=seen, max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def logits(model, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] in the model's dtype."""
    return model(torch.tensor([list(tokens)], device=model.device)).logits[0]
