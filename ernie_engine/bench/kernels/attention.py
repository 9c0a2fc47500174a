"""Cases of attention over a paged cache: prompts and decode rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import Tensors, near_each
from ernie_engine.bench.kernels.shapes import RankShape

BLOCK_SIZE = 16
MAX_DECODE_ROWS = 256
MAX_CACHED_TOKENS = 1 << 21  # of a case's rows together: what stands in the cache must fit
CHECKED_QUERIES = 32
CONTEXTS = (1024, 8192, 131072)


def prefill_attention_cases(
    shape: RankShape, tokens: int, dtype: torch.dtype
) -> Iterator[KernelCase]:
    """A whole prompt; a chunk of one behind what is cached already."""
    for past in (0, 8192):
        if tokens > 1:
            rows = [(tokens, past + tokens)]
            what = f"past {past}" if past else "prompt"
            yield _case("prefill_attention", f"{shape.name} {what}", shape, rows, dtype)


def decode_attention_cases(
    shape: RankShape, tokens: int, dtype: torch.dtype
) -> Iterator[KernelCase]:
    for context in CONTEXTS:
        if tokens <= MAX_DECODE_ROWS and tokens * context <= MAX_CACHED_TOKENS:
            case = _case(
                "decode_attention", f"{shape.name} {context}", shape, [(1, context)] * tokens, dtype
            )
            yield replace(case, table_size=tokens * shape.kv_heads)


def _case(
    op: str, label: str, shape: RankShape, rows: Sequence[tuple[int, int]], dtype: torch.dtype
) -> KernelCase:
    """Rows of (query tokens, context); blocks in random order."""
    tokens, dim = sum(n for n, _ in rows), shape.head_dim
    per_row = [-(-context // BLOCK_SIZE) for _, context in rows]

    def make(device):
        q = torch.randn(tokens, shape.heads, dim, dtype=dtype, device=device)
        cache_shape = 2, sum(per_row), BLOCK_SIZE, shape.kv_heads, dim
        caches = torch.randn(cache_shape, dtype=dtype, device=device)
        ids = torch.randperm(sum(per_row), device=device).int()
        tables = torch.zeros(len(rows), max(per_row), dtype=torch.int32, device=device)
        for row, blocks in enumerate(ids.split(per_row)):
            tables[row, : len(blocks)] = blocks
        lens = torch.tensor(rows, dtype=torch.int32, device=device)  # [R, 2]
        start = torch.zeros(len(rows) + 1, dtype=torch.int32, device=device)
        start[1:] = lens[:, 0].cumsum(0)
        longest = max(n for n, _ in rows)
        return q, caches[0], caches[1], tables, start, lens[:, 1].contiguous(), dim**-0.5, longest

    cached = sum(context for _, context in rows) * 2 * shape.kv_heads * dim
    moved = (2 * tokens * shape.heads * dim + cached) * dtype.itemsize
    pairs = sum(n * (context - n) + n * (n + 1) / 2 for n, context in rows)
    work = Work(moved, 4 * pairs * shape.heads * dim)
    return KernelCase(op, label, tokens, make, work, near_for_some_queries)


def near_for_some_queries(
    arguments: Sequence[Any], out: Tensors, wide: Callable[[], Tensors], twin: Tensors
) -> str | None:
    """All scores of a long prompt in fp64 would not fit the card: some queries, first and last."""
    q, query_start, context_lens = arguments[0], arguments[4].tolist(), arguments[5].tolist()
    tokens = sorted({0, len(q) - 1, *torch.randint(0, len(q), (CHECKED_QUERIES,)).tolist()})
    exact = []
    for token in tokens:
        row = max(r for r, start in enumerate(query_start[:-1]) if start <= token)
        visible = context_lens[row] - (query_start[row + 1] - 1 - token)
        exact.append(_attend(arguments, row, token, visible))
    return near_each(out[0][tokens], torch.stack(exact), twin[0][tokens])


def _attend(arguments: Sequence[Any], row: int, token: int, visible: int) -> Tensor:
    """One query token over the first `visible` tokens of its row, in fp64: [Hq, D]."""
    q, k_cache, v_cache, tables, _, _, scale, _ = arguments
    blocks = tables[row, : -(-visible // BLOCK_SIZE)]
    k, v = (cache[blocks].flatten(0, 1)[:visible].double() for cache in (k_cache, v_cache))
    query = q[token].double().unflatten(0, (k.shape[1], -1))  # [Hkv, group, D]
    scores = torch.einsum("hgd,chd->hgc", query, k) * scale
    return torch.einsum("hgc,chd->hgd", scores.softmax(dim=-1), v).flatten(0, 1)
