"""Causal attention over a row's paged context, for many rows with 1 to 8 query tokens each.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],   j <= position of t

The same maths and arguments as prefill_attention; the shape of the work differs: here reading
the cache is the cost. Never reads a slot beyond a row's context: blocks are reused and those
slots may hold anything, NaN too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GATHERED_TOKENS = 1 << 18  # rows x longest context of one padded batch


def _gather_context(cache: Tensor, block_tables: Tensor, token: Tensor) -> Tensor:
    """cache [num_blocks, block_size, Hkv, D], block_tables [B, M], token [B, C], the index of
    each wanted token in its row -> [B, Hkv, C, D]."""
    block_size = cache.shape[1]
    blocks = block_tables.gather(1, token // block_size)  # [B, C]
    return cache[blocks, token % block_size].transpose(1, 2)


def _batch_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, num_kv_heads: int, scale: float
) -> Tensor:
    """q [B, N, Hq, D], k, v [B, Hkv, C, D], positions [B, N] of q's tokens -> [B, N, Hq, D].

    The query heads of a group become query tokens of their K/V head, so that no K/V is copied.
    """
    num_queries = q.shape[1]
    q = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, group, N, D]
    key_positions = torch.arange(k.shape[2], device=q.device)
    mask = key_positions <= positions[:, None, :, None]  # [B, 1, N, C]
    out = F.scaled_dot_product_attention(
        q.flatten(2, 3), k, v, attn_mask=mask.repeat(1, 1, q.shape[2], 1), scale=scale
    )
    return out.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def decode_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    max_query_len: int,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D], T = query_start[R].

    k_cache, v_cache [num_blocks, block_size, Hkv, D], already holding the query tokens' own K/V;
    block_tables [R, M] int32; query_start [R + 1] int32, cumulative query tokens; context_lens
    [R] int32 = cached + query tokens; `max_query_len`, the most query tokens of a row. Rows
    without query tokens are passed over.
    """
    out = torch.empty_like(q)
    rows = query_start.diff().nonzero().flatten()
    if rows.numel() == 0:
        return out
    rows_per_batch = max(1, MAX_GATHERED_TOKENS // int(context_lens.max()))
    for batch in rows.split(rows_per_batch):
        starts, context = query_start[batch, None].long(), context_lens[batch, None].long()
        counts = query_start[batch + 1, None] - starts  # [B, 1]
        step = torch.arange(max_query_len, device=q.device)
        # A short row is padded with its own last token, so that no padding can be NaN.
        query = torch.minimum(step, counts - 1)  # [B, N]
        token = torch.minimum(torch.arange(int(context.max()), device=q.device), context - 1)
        k, v = (_gather_context(c, block_tables[batch], token) for c in (k_cache, v_cache))
        positions = context - counts + query
        y = _batch_attention(q[starts + query], k, v, positions, k_cache.shape[2], scale)
        real = step < counts  # [B, N]
        out[(starts + query)[real]] = y[real]
    return out


IMPLEMENTATIONS = {"decode_attention": {"torch": decode_attention_torch}}
