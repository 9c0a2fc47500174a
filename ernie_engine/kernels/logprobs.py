"""Log-probabilities of given tokens and of the best ones, from raw logits.

    logprob[v] = z[v] - log(sum_u exp(z[u]))

Tokens are ordered by logit, equal logits by the lower id: rank r is the r-th of top_ids.
Never sees temperature, penalties or filters: callers hand over the logits they mean.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.candidates import (
    CHUNK,
    WIDTH,
    chunk_at,
    chunk_ids,
    empty_candidates,
    find_maxima,
    load_candidates,
    load_logits,
    store_candidates,
)
from ernie_engine.kernels.ordering import FIRST_KEY, key_ids, key_values, kth_largest, order_keys


@triton.jit
def _best(best_keys, num_chunks, CHUNKS: tl.constexpr):
    """The largest logit of this program's row."""
    chunks = tl.arange(0, CHUNKS)
    at = best_keys + tl.program_id(0).to(tl.int64) * num_chunks + chunks
    return key_values(tl.max(tl.load(at, mask=chunks < num_chunks, other=FIRST_KEY), axis=0))


@triton.jit(do_not_specialize=["num_top"])
def _bound_kernel(group_maxima, bounds, num_groups, num_top, GROUPS: tl.constexpr):
    """A logit that at least num_top tokens of the row reach; infinite if none are asked for."""
    row, groups = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    bound = tl.full([], float("inf"), tl.float32)
    if num_top > num_groups:
        bound = tl.full([], -float("inf"), tl.float32)
    elif num_top > 0:
        inside = groups < num_groups
        maxima = tl.load(group_maxima + row * num_groups + groups, mask=inside, other=-float("inf"))
        bound = kth_largest(maxima, num_top)
    tl.store(bounds + row, bound)


@triton.jit
def _gather_kernel(
    logits,
    tokens,
    best_keys,
    bounds,
    candidates,
    counts,
    sums,
    ranks,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of a chunk: the candidates, the sum of exp(z - best), how many are the token or better."""
    row = tl.program_id(0).to(tl.int64)
    ids = chunk_ids(CHUNK)
    z, inside = load_logits(logits, ids, vocab_size), ids < vocab_size
    keys = order_keys(z, ids)
    store_candidates(keys, inside & (z >= tl.load(bounds + row)), candidates, counts, CHUNK)
    best = _best(best_keys, num_chunks, CHUNKS)
    tl.store(sums + chunk_at(), tl.sum(tl.exp(z - best), axis=0))
    token = tl.load(tokens + row)
    token_key = order_keys(tl.load(logits + row * vocab_size + token), token)
    tl.store(ranks + chunk_at(), tl.sum((inside & (keys >= token_key)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_top"])
def _finish_kernel(
    logits,
    tokens,
    best_keys,
    candidates,
    counts,
    sums,
    ranks,
    logprobs,
    token_ranks,
    top_ids,
    top_logprobs,
    vocab_size,
    num_chunks,
    num_top,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row's answers; the best are taken one after the other, each the best below the last."""
    row, chunks = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    inside, at = chunks < num_chunks, row * num_chunks + chunks
    best = _best(best_keys, num_chunks, CHUNKS)
    log_sum = tl.log(tl.sum(tl.load(sums + at, mask=inside, other=0.0), axis=0))
    logit = tl.load(logits + row * vocab_size + tl.load(tokens + row))
    tl.store(logprobs + row, logit - best - log_sum)
    rank = tl.sum(tl.load(ranks + at, mask=inside, other=0).to(tl.int64), axis=0)
    tl.store(token_ranks + row, rank)
    sizes, own = tl.load(counts + at, mask=inside, other=0), candidates + row * num_chunks * CHUNK
    head = load_candidates(own, sizes, 0, CHUNK, CHUNKS, WIDTH)
    widest, last = tl.max(sizes, axis=0), tl.full([], -FIRST_KEY, tl.int64)
    for place in range(num_top):
        found = tl.max(tl.where(head < last, head, FIRST_KEY))
        for start in range(WIDTH, widest, WIDTH):
            keys = load_candidates(own, sizes, start, CHUNK, CHUNKS, WIDTH)
            found = tl.maximum(found, tl.max(tl.where(keys < last, keys, FIRST_KEY)))
        last = found
        tl.store(top_ids + row * num_top + place, key_ids(last))
        tl.store(top_logprobs + row * num_top + place, key_values(last) - best - log_sum)


def token_logprobs_triton(
    logits: Tensor, tokens: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As token_logprobs_torch. Made for a num_top of tens: each is a pass over the candidates."""
    logits, tokens, device = logits.contiguous(), tokens.contiguous(), logits.device
    rows, vocab_size = logits.shape
    best_keys, group_maxima = find_maxima(logits)
    chunks, groups = best_keys.shape[1], group_maxima.shape[1]
    chunks_2 = triton.next_power_of_2(chunks)
    bounds = torch.empty(rows, dtype=torch.float32, device=device)
    _bound_kernel[(rows,)](
        group_maxima, bounds, groups, num_top, GROUPS=triton.next_power_of_2(groups)
    )
    candidates, counts = empty_candidates(rows, chunks, device)
    sums = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    found = candidates, counts, sums, ranks
    _gather_kernel[(rows, chunks)](
        *(logits, tokens, best_keys, bounds, *found, vocab_size, chunks),
        CHUNK=CHUNK,
        CHUNKS=chunks_2,
    )
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    rank = torch.empty(rows, dtype=torch.int64, device=device)
    top_ids = torch.empty(rows, num_top, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(rows, num_top, dtype=torch.float32, device=device)
    answers = logprob, rank, top_ids, top_logprobs
    _finish_kernel[(rows,)](
        *(logits, tokens, best_keys, *found, *answers, vocab_size, chunks, num_top),
        CHUNK=CHUNK,
        CHUNKS=chunks_2,
        WIDTH=WIDTH,
        num_warps=8,
    )
    return answers


def _order_keys(logits: Tensor) -> Tensor:
    """logits [R, V] fp32 -> [R, V] int64, all different: larger means earlier in the order.

    The high word is the float's bits made to sort as integers, the low word falls with the id.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards
    return (ordered << 32) - torch.arange(logits.shape[1], device=logits.device)


def token_logprobs_torch(
    logits: Tensor, tokens: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] fp32, tokens [R] int64, num_top <= V -> (logprob [R] fp32 and rank [R] int64,
    1 = highest, of the tokens; top_ids [R, num_top] int64, top_logprobs [R, num_top] fp32)."""
    logprobs = logits.log_softmax(dim=-1)
    keys = _order_keys(logits)
    tokens = tokens[:, None]
    rank = (keys >= keys.gather(1, tokens)).sum(dim=-1)
    top_ids = keys.topk(num_top, dim=-1).indices
    return logprobs.gather(1, tokens)[:, 0], rank, top_ids, logprobs.gather(1, top_ids)


IMPLEMENTATIONS = {
    "token_logprobs": {"triton": token_logprobs_triton, "torch": token_logprobs_torch}
}
