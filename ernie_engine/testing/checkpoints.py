"""Random tiny ERNIE-4.5 checkpoints in the hub's exact format, for tests and demonstrations.

Owns the names, shapes, dtypes and values of the tensors and their files. Never reads a
checkpoint, and never overwrites one.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernie_engine.testing.spec import CheckpointSpec, generation_config, hub_config
from ernie_engine.testing.tokenizers import write_tokenizer

Shapes = Iterator[tuple[str, tuple[int, ...]]]

LOGITS_STD = 2.5  # peaked enough that the best token is clearly the best


def write_checkpoint(folder: Path, spec: CheckpointSpec, text: Sequence[str] | None = None) -> Path:
    """Writes the checkpoint and returns `folder`; ValueError if one is there already.

    The tokenizer is trained on the lines of `text`, else on the project's own.
    """
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds a checkpoint already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if spec.tokenizer:  # first: it may find the vocabulary too small
        write_tokenizer(folder, spec.vocab_size, spec.thinking, text)
    _write_tensors(folder, random_tensors(spec), spec.shards)
    write_json(folder / "generation_config.json", generation_config(spec))
    write_json(folder / "config.json", hub_config(spec))
    return folder


def random_tensors(spec: CheckpointSpec) -> dict[str, Tensor]:
    """Every tensor by hub name: spec.dtype, but the routers' weight and bias are float32.

    Norm weights lie around 1, so that a forgotten one shows.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    tensors = {}
    for name, shape in _shapes(spec):
        values = torch.randn(shape, generator=generator)
        mean, std = _distribution(name, shape, spec)
        router = "e_score_correction_bias" in name or name.endswith("mlp.gate.weight")
        dtype = torch.float32 if router else getattr(torch, spec.dtype)
        tensors[name] = (mean + std * values).to(dtype)
    return tensors


def _shapes(spec: CheckpointSpec) -> Shapes:
    hidden = spec.hidden_size
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        yield from _attention_shapes(prefix, spec)
        if spec.is_moe_layer(layer):
            yield from _moe_shapes(f"{prefix}.mlp", spec)
        else:
            yield from _mlp_shapes(f"{prefix}.mlp", hidden, spec.intermediate_size)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)
    if spec.mtp:
        yield from _attention_shapes("model.mtp_block.0", spec)
        yield from _mlp_shapes("model.mtp_block.0.mlp", hidden, spec.intermediate_size)
        yield "model.mtp_emb_norm.0.weight", (hidden,)
        yield "model.mtp_hidden_norm.0.weight", (hidden,)
        yield "model.mtp_linear_proj.0.weight", (hidden, 2 * hidden)


def _attention_shapes(prefix: str, spec: CheckpointSpec) -> Shapes:
    """A block without its MLP."""
    hidden, head_dim = spec.hidden_size, spec.head_size
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.self_attn.q_proj.weight", (spec.num_heads * head_dim, hidden)
    yield f"{prefix}.self_attn.k_proj.weight", (spec.num_kv_heads * head_dim, hidden)
    yield f"{prefix}.self_attn.v_proj.weight", (spec.num_kv_heads * head_dim, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, spec.num_heads * head_dim)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _moe_shapes(prefix: str, spec: CheckpointSpec) -> Shapes:
    yield f"{prefix}.gate.weight", (spec.num_experts, spec.hidden_size)
    yield f"{prefix}.moe_statics.e_score_correction_bias", (1, spec.num_experts)
    width = spec.moe_intermediate_size
    for expert in range(spec.num_experts):
        yield from _mlp_shapes(f"{prefix}.experts.{expert}", spec.hidden_size, width)
    if spec.num_shared_experts:
        shared_width = (
            spec.num_shared_experts * width
        )  # one MLP, however many experts it stands for
        yield from _mlp_shapes(f"{prefix}.shared_experts", spec.hidden_size, shared_width)


def _mlp_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _distribution(name: str, shape: tuple[int, ...], spec: CheckpointSpec) -> tuple[float, float]:
    """(mean, std) of a tensor's values."""
    if "e_score_correction_bias" in name:
        return spec.router_bias_mean, spec.router_bias_spread
    if len(shape) == 1:
        return 1.0, 0.1
    if spec.weight_std is not None:
        return 0.0, spec.weight_std
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.0, LOGITS_STD / math.sqrt(spec.hidden_size)  # the final norm has a scale of 1
    # what blocks add outweighs a token's own embedding: else a tied head repeats the last token
    gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
    return 0.0, gain / math.sqrt(shape[-1])


def _write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """One file, or files of about the same number of tensors and an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
