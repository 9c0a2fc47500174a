"""How much memory the K/V cache gets: what was set, or what the largest step and graphs leave.

Owns that arithmetic, and prints it. Takes no memory itself.
"""

import logging
from collections.abc import Callable

import torch

from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.model.kv_cache import KVCache, KVGeometry
from ernie_engine.model.recording import GraphMaker, bytes_of_graphs
from ernie_engine.model.rehearsal import largest_plan, rehearse
from ernie_engine.model.runner import ModelRunner

logger = logging.getLogger(__name__)
GIB = 1 << 30
CPU_KV_BYTES = 4 * GIB


def kv_bytes(
    config: ResolvedConfig,
    geometry: KVGeometry,
    runner_with: Callable[[KVCache], ModelRunner],
    maker_with: Callable[[KVCache], GraphMaker | None],
) -> tuple[int, int, str]:
    """The memory for K/V blocks, what was set aside for graphs, and why so much."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, 0, "kv_cache_memory_bytes"
    if config.device.startswith("cuda"):
        return measure_free_memory(config, geometry, runner_with, maker_with)
    one = geometry.blocks_for(config.max_model_len) * geometry.bytes_per_block
    why = "the CPU default: 4 GiB, but from 1 to max_num_seqs requests of full length"
    return max(one, min(CPU_KV_BYTES, config.max_num_seqs * one)), 0, why


def tell_blocks(
    config: ResolvedConfig, geometry: KVGeometry, num_blocks: int, num_bytes: int, why: str
) -> None:
    """Show the arithmetic; ValueError unless one request of full length fits."""
    needed = geometry.blocks_for(config.max_model_len)
    g, tokens = geometry, num_blocks * geometry.block_size
    logger.info(
        "K/V cache: 2 x %d layers x %d heads x %d x %d bytes = %d bytes a token; "
        "%.2f GiB (%s) -> %d blocks of %d = %d tokens = %.1f x max_model_len %d",
        *(g.num_layers, g.num_kv_heads, g.head_dim, g.dtype.itemsize, g.bytes_per_token),
        *(num_bytes / GIB, why, num_blocks, g.block_size, tokens),
        *(tokens / config.max_model_len, config.max_model_len),
    )
    if num_blocks < needed:
        raise ValueError(
            f"max_model_len={config.max_model_len} needs {needed} K/V blocks and {num_blocks} fit "
            f"({why}): lower max_model_len to {tokens} or give the cache more memory"
        )


def measure_free_memory(
    config: ResolvedConfig,
    geometry: KVGeometry,
    runner_with: Callable[[KVCache], ModelRunner],
    maker_with: Callable[[KVCache], GraphMaker | None],
) -> tuple[int, int, str]:
    """What gpu_memory_utilization leaves after the largest step the engine can be asked for, and
    the graphs. With several ranks all take that step together."""
    device = torch.device(config.device)
    kv = KVCache(geometry, 1, device)
    runner = runner_with(kv)
    torch.cuda.reset_peak_memory_stats(device)
    plan = largest_plan(config)
    rehearse(runner, plan)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    peak += runner.pipe.most_bytes(sum(plan.num_tokens))
    for_graphs = 0
    if (maker := maker_with(kv)) is not None:
        model = runner.model
        logits_bytes = 4 * model.vocab_size if model.is_last else 0
        for_graphs = bytes_of_graphs(
            maker,
            hidden_bytes=runner.pipe.bytes_per_token,
            logits_bytes=logits_bytes,
            has_collectives=runner.mesh.tp_size > 1,
        )
    del runner, maker, kv
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    left = int(total * config.gpu_memory_utilization) - peak - for_graphs - others
    why = (
        f"{config.gpu_memory_utilization} x {total / GIB:.1f} GiB - {peak / GIB:.1f} measured peak"
        f" - {for_graphs / GIB:.2f} for CUDA graphs - {others / GIB:.1f} outside torch"
    )
    return max(0, left), for_graphs, why
