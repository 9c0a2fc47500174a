"""The next token of each row: greedy, or a draw from the filtered distribution.

Order: temperature, min-p, top-k, top-p; then Gumbel-max, argmax(z + noise), which draws from
softmax(z). The noise depends on (seed, position, token id) alone, so a row's draw never depends
on the rows beside it. Every tie goes to the lower token id. Logits may hold -inf (a forbidden
token), never +inf or NaN, and a row always has a finite one.

The Triton kernels cut rows into chunks, a program for each. top_filter.py says from which order key
on a token is kept; a row without top-k and top-p gets the key below all, for next to nothing.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.candidates import CHUNK, chunk_at, chunk_ids, load_logits, num_chunks
from ernie_engine.kernels.ordering import FIRST_KEY, key_ids, order_keys
from ernie_engine.kernels.philox import gumbel_noise, gumbel_noise_of
from ernie_engine.kernels.row_settings import (
    TEMPERATURE,
    find_settings,
    load_setting,
    scaled_logits,
)
from ernie_engine.kernels.tickets import is_last, tickets
from ernie_engine.kernels.top_filter import find_thresholds


@triton.jit
def _greedy_kernel(
    logits,
    best_keys,
    tokens,
    counters,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two that holds all chunks
):
    """A chunk's best key; the last program of a row has the best of all."""
    row, ids = tl.program_id(0).to(tl.int64), chunk_ids(CHUNK)
    keys = order_keys(load_logits(logits, ids, vocab_size), ids)
    keys = tl.where(ids < vocab_size, keys, FIRST_KEY)
    tl.store(best_keys + chunk_at(), tl.max(keys, axis=0))
    num_chunks = tl.num_programs(1)
    if is_last(counters + row, num_chunks):
        chunks = tl.arange(0, CHUNKS)
        at = best_keys + row * num_chunks + chunks
        best = tl.load(at, mask=chunks < num_chunks, other=FIRST_KEY, cache_modifier=".cg")
        tl.store(tokens + row, key_ids(tl.max(best, axis=0)))


def _find_greedy(logits: Tensor) -> Tensor:
    """logits [R, V] fp32, contiguous -> each row's best token [R] int64, in one launch."""
    (rows, vocab_size), device = logits.shape, logits.device
    chunks, counters = num_chunks(vocab_size), tickets("sample", device)
    assert rows <= len(counters)
    best_keys = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    _greedy_kernel[(rows, chunks)](
        *(logits, best_keys, tokens, counters, vocab_size),
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=4,
    )
    return tokens


@triton.jit
def _draw_kernel(
    logits,
    settings,
    thresholds,
    seeds,
    positions,
    drawn_keys,
    seed_stride,
    position_stride,
    vocab_size,
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A chunk's best z + noise, as an order key."""
    row = tl.program_id(0).to(tl.int64)
    drawn = tl.full([], FIRST_KEY, tl.int64)
    if load_setting(settings, TEMPERATURE) > 0:
        ids = chunk_ids(CHUNK)
        z = scaled_logits(load_logits(logits, ids, vocab_size), settings)
        if FILTERED:
            z = tl.where(order_keys(z, ids) >= tl.load(thresholds + row), z, -float("inf"))
        if tl.max(z, axis=0) > -float("inf"):  # the noise is what costs
            seed, position = tl.load(seeds + row * seed_stride), row * position_stride
            noise = gumbel_noise_of(ids, tl.load(positions + position), seed)
            drawn = tl.max(order_keys(z + noise, ids), axis=0)
    tl.store(drawn_keys + chunk_at(), drawn)


@triton.jit
def _choose_kernel(settings, greedy, drawn_keys, tokens, num_chunks, CHUNKS: tl.constexpr):
    row, chunks = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    keys = tl.load(drawn_keys + row * num_chunks + chunks, mask=inside, other=FIRST_KEY)
    is_drawn, drawn = load_setting(settings, TEMPERATURE) > 0, key_ids(tl.max(keys, axis=0))
    tl.store(tokens + row, tl.where(is_drawn, drawn, tl.load(greedy + row)))


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    draws: bool = True,
    filters: bool = True,
) -> Tensor:
    """As sample_torch, and the same tokens."""
    logits = logits.contiguous()
    if not draws:
        return _find_greedy(logits)
    rows, vocab_size = logits.shape
    settings, greedy = find_settings(logits, temperature, top_k, top_p, min_p)
    thresholds = find_thresholds(logits, settings) if filters else greedy  # not looked at
    chunks = num_chunks(vocab_size)
    drawn_keys = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    strides = seeds.stride(0), positions.stride(0)
    _draw_kernel[(rows, chunks)](
        *(logits, settings, thresholds, seeds, positions, drawn_keys, *strides, vocab_size),
        FILTERED=filters,
        CHUNK=CHUNK,
        num_warps=8,
    )
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _choose_kernel[(rows,)](
        settings, greedy, drawn_keys, tokens, chunks, CHUNKS=triton.next_power_of_2(chunks)
    )
    return tokens


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """logits [R, V], the best of a row 0, with -inf for what top-k, then top-p over the rest,
    leave out.

    top_k [R] (0 = off): exactly k tokens. top_p [R] (1 = off): the fewest tokens, best first,
    whose mass exp(logit) reaches top_p of the whole, at least one. Sums are fp64 and not divided:
    equal on every device, and exact for equal tokens.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    k = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    mass = ordered.double().exp().masked_fill(rank >= k, 0.0)
    before = mass.cumsum(dim=-1) - mass  # of all better tokens
    enough = top_p.double()[:, None] * mass.sum(dim=-1, keepdim=True)
    out_of = (rank >= k) | ((before >= enough) & (rank > 0))
    return torch.empty_like(logits).scatter_(1, ids, ordered.masked_fill(out_of, -torch.inf))


def sample_torch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    draws: bool = True,
    filters: bool = True,
) -> Tensor:
    """logits [R, V] fp32; temperature (0 = greedy), top_p (1 = off), min_p (0 = off) [R] fp32;
    top_k [R] int (0 = off); seeds, positions [R] int64 -> token ids [R] int64.

    min-p keeps tokens with at least min_p times the probability of the best one. `draws` and
    `filters` say that some row may have a temperature, and some a top-k or top-p: what the caller
    knows to be off is not launched.
    """
    greedy = logits.argmax(dim=-1)
    drawn = temperature > 0
    if not draws or not drawn.any():
        return greedy
    # Shifting by the maximum changes no probability, keeps tiny temperatures from overflowing,
    # and makes min-p a comparison: log(p / p_best) is the shifted logit itself.
    z = logits - logits.amax(dim=-1, keepdim=True)
    z = z / torch.where(drawn, temperature, 1.0)[:, None]
    z = z.masked_fill(z < min_p.double().log().float()[:, None], -torch.inf)
    rows = (drawn & ((top_k > 0) | (top_p < 1))).nonzero().flatten()
    if filters and rows.numel():  # only these pay for a sort
        z[rows] = _keep_top(z[rows], top_k[rows], top_p[rows])
    choice = (z + gumbel_noise(seeds, positions, logits.shape[1])).argmax(dim=-1)
    return torch.where(drawn, choice, greedy)


IMPLEMENTATIONS = {"sample": {"triton": sample_triton, "torch": sample_torch}}
