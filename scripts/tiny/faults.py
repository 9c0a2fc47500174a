"""Faulty copies of a checkpoint: each is a known mistake of a port, planted in the weights.

An evaluation that cannot tell a faulty copy from the original proves nothing. Never changes the
original.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import WEIGHTS, save_weights, write_sums

Tensors = dict[str, Tensor]


def drop_bias(tensors: Tensors, head_dim: int) -> None:
    """The router forgets the correction bias."""
    for name in _ending(tensors, "e_score_correction_bias"):
        tensors[name] = torch.zeros_like(tensors[name])


def round_bias(tensors: Tensors, head_dim: int) -> None:
    """The correction bias is kept in bfloat16, whose steps near +24 are 0.125."""
    for name in _ending(tensors, "e_score_correction_bias"):
        tensors[name] = tensors[name].bfloat16().float()


def neox_rope(tensors: Tensors, head_dim: int) -> None:
    """RoPE pairs element i with i + D/2 instead of 2i with 2i + 1.

    Rows of q and k are put in the order 0, D/2, 1, D/2 + 1, ...: rotating neighbours then rotates
    the NeoX pairs, and the scores are those of a NeoX rotation of the true q and k.
    """
    order = torch.arange(head_dim).view(2, -1).T.flatten()
    for name in _ending(tensors, "q_proj.weight") + _ending(tensors, "k_proj.weight"):
        heads = tensors[name].unflatten(0, (-1, head_dim))
        tensors[name] = heads[:, order].flatten(0, 1).contiguous()


def swap_experts(tensors: Tensors, head_dim: int) -> None:
    """In every layer the experts of third and fourth highest correction bias have each other's
    weights; the routers do not know.

    The pair is chosen because it shows: ernie-tiny answers as before after most other swaps.
    """
    for bias in _ending(tensors, "moe_statics.e_score_correction_bias"):
        experts = bias.replace("moe_statics.e_score_correction_bias", "experts.")
        order = tensors[bias].flatten().argsort(descending=True).tolist()
        for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
            a, b = (f"{experts}{expert}.{part}" for expert in order[2:4])
            tensors[a], tensors[b] = tensors[b], tensors[a]


def silence_experts(tensors: Tensors, head_dim: int) -> None:
    """No routed expert says anything: how much of the score do they carry at all?"""
    for name in _ending(tensors, "down_proj.weight"):
        if ".mlp.experts." in name:
            tensors[name] = torch.zeros_like(tensors[name])


def _ending(tensors: Tensors, end: str) -> list[str]:
    return [name for name in tensors if name.endswith(end)]


FAULTS: dict[str, Callable[[Tensors, int], None]] = {
    "bias_dropped": drop_bias,
    "bias_in_bf16": round_bias,
    "rope_neox": neox_rope,
    "experts_swapped": swap_experts,
    "experts_silent": silence_experts,
}


def plant(source: Path, target: Path, fault: str, head_dim: int) -> None:
    """Write a copy of `source` with one of FAULTS to `target`, which must not exist."""
    if fault not in FAULTS:
        raise ValueError(f"fault: {fault!r} is not known; use one of {sorted(FAULTS)}")
    shutil.copytree(source, target)
    with safe_open(source / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    FAULTS[fault](tensors, head_dim)
    save_weights(tensors, target)
    write_sums(target)
