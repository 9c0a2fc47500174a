"""All kernel cases, by op. An op that is not here cannot be measured nor compiled without a GPU."""

from collections.abc import Callable, Iterator

import torch

from ernie_engine.bench.kernels.attention import decode_attention_cases, prefill_attention_cases
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.experts import (
    moe_experts_cases,
    norm_moe_cases,
    norm_router_cases,
    router_cases,
)
from ernie_engine.bench.kernels.layer import (
    add_rms_norm_cases,
    decode_rows_cases,
    embedding_cases,
    linear_cases,
    norm_qkv_rope_cases,
    norm_swiglu_cases,
    rms_norm_cases,
    rope_and_cache_cases,
    swiglu_cases,
    vocab_head_cases,
)
from ernie_engine.bench.kernels.sampling import (
    apply_penalties_cases,
    sample_cases,
    token_counts_cases,
    token_logprobs_cases,
)
from ernie_engine.bench.kernels.shapes import RankShape
from ernie_engine.kernels.registry import IMPLEMENTATIONS, select

Cases = Callable[[RankShape, int, torch.dtype], Iterator[KernelCase]]
CASES: dict[str, Cases] = {
    "decode_rows": decode_rows_cases,
    "embedding": embedding_cases,
    "linear": linear_cases,
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "rope_and_cache": rope_and_cache_cases,
    "prefill_attention": prefill_attention_cases,
    "decode_attention": decode_attention_cases,
    "swiglu": swiglu_cases,
    "router": router_cases,
    "moe_experts": moe_experts_cases,
    "vocab_head": vocab_head_cases,
    "token_counts": token_counts_cases,
    "apply_penalties": apply_penalties_cases,
    "sample": sample_cases,
    "token_logprobs": token_logprobs_cases,
    "norm_qkv_rope": norm_qkv_rope_cases,
    "norm_swiglu": norm_swiglu_cases,
    "norm_router": norm_router_cases,
    "norm_moe": norm_moe_cases,
}


def ops_with(name: str, device_type: str) -> list[str]:
    """The ops that have the implementation. ValueError if it cannot run on such a device."""
    ops = [op for op in CASES if name in IMPLEMENTATIONS[op]]
    for op in ops:
        select(f"torch,{op}={name}", device_type)
    if not ops:
        known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
        raise ValueError(f"there is no implementation {name!r}; use one of {known}")
    return ops
