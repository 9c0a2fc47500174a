"""Causal attention of new tokens over a row's paged context, for rows with many query tokens.

    out[t] = sum_j softmax_j(scale * q[t] . k[j]) v[j],   j <= position of t

A row's query tokens are the last of its context; what stands before them was cached earlier.
Query head i reads K/V head i // (Hq / Hkv). Never reads a slot beyond a row's context: blocks
are reused and those slots may hold anything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MASK_ELEMENTS = 1 << 26  # query tokens x context tokens of one masked product


def _row_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One row: q [N, Hq, D], k, v [C, Hq, D], N <= C -> [N, Hq, D]."""
    num_queries, context = len(q), len(k)
    past = context - num_queries
    # With three dims torch would leave its fused kernels and write all scores to memory.
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # [1, Hq, N or C, D]
    if past == 0:  # torch's causal mask starts at the first key: right only without a past
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out[0].transpose(0, 1)
    chunk = max(1, MAX_MASK_ELEMENTS // context)
    outputs = []
    for first in range(0, num_queries, chunk):
        last = min(first + chunk, num_queries)
        visible = past + last  # keys that the chunk's last query token sees
        mask = torch.ones(last - first, visible, dtype=torch.bool, device=q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, :visible],
                v[:, :, :visible],
                attn_mask=mask.tril_(past + first),
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def prefill_attention_torch(
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
    [R] int32 = cached + query tokens. Rows without query tokens are passed over.
    `max_query_len`, the most query tokens of a row, sizes a kernel's grid; here rows are looped.
    """
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    bounds = query_start.tolist()
    for row, context in enumerate(context_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        if queries.start == queries.stop:
            continue
        blocks = block_tables[row, : -(-context // block_size)]
        # [C, Hq, D] each: not every fused kernel of torch takes grouped heads.
        k, v = (
            cache[blocks].flatten(0, 1)[:context].repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )
        out[queries] = _row_attention(q[queries], k, v, scale)
    return out


IMPLEMENTATIONS = {"prefill_attention": {"torch": prefill_attention_torch}}
