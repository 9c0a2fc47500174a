"""Where top-k and top-p cut a row: the worst order key that they keep, found without a sort.

Top-k keeps the k best keys of z (row_settings.py); top-p the fewest of those, best first, whose
mass reaches p * (the mass of those), a mass being exp(z) in fp64. Both ask for the largest key from
which on the weights of all better ones reach a target: weights of 1 and a target of k, or masses.
It is found bit by bit, among the tokens that reach the row's bound; others count in a mass only.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.candidates import (
    CHUNK,
    chunk_at,
    chunk_ids,
    empty_candidates,
    load_candidates,
    load_logits,
    num_chunks,
    store_candidates,
)
from ernie_engine.kernels.launch import DEFAULT, pick
from ernie_engine.kernels.ordering import FIRST_KEY, KEY_BITS, key_values, order_keys
from ernie_engine.kernels.row_settings import BOUND, TOP_K, TOP_P, load_setting, scaled_logits

# By the number of rows. WIDTH: candidates of every chunk that are held in registers.
TABLE = {(DEFAULT, 256): {"WIDTH": 64, "num_warps": 16}}
CANDIDATES = [
    {"WIDTH": width, "num_warps": warps} for width in (32, 64, 128) for warps in (4, 8, 16)
]


@triton.jit
def _gather_kernel(logits, settings, candidates, counts, masses, vocab_size, CHUNK: tl.constexpr):
    """A chunk's candidates, and for top-p alone the mass of all its tokens."""
    bound = load_setting(settings, BOUND)
    if bound < float("inf"):
        ids = chunk_ids(CHUNK)
        z = scaled_logits(load_logits(logits, ids, vocab_size), settings)
        wanted = (z >= bound) & (z > -float("inf"))
        store_candidates(order_keys(z, ids), wanted, candidates, counts, CHUNK)
        if load_setting(settings, TOP_K) == 0:
            tl.store(masses + chunk_at(), tl.sum(tl.exp(z.to(tl.float64)), axis=0))


@triton.jit
def _weights(keys, IS_MASS: tl.constexpr):
    """[CHUNKS, WIDTH] fp64; 0 where there is no candidate."""
    if IS_MASS:
        weights = tl.exp(key_values(keys).to(tl.float64))
    else:
        weights = tl.full(keys.shape, 1.0, tl.float64)
    return tl.where(keys == FIRST_KEY, 0.0, weights)


@triton.jit
def _weight_from(
    lowest,
    head,
    head_weights,
    candidates,
    counts,
    widest,
    IS_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The weight of all keys >= lowest. The head, mostly all there are, is held in registers."""
    total = tl.sum(tl.where(head >= lowest, head_weights, 0.0))
    for start in range(WIDTH, widest, WIDTH):
        keys = load_candidates(candidates, counts, start, CHUNK, CHUNKS, WIDTH)
        total += tl.sum(tl.where(keys >= lowest, _weights(keys, IS_MASS), 0.0))
    return total


@triton.jit
def _largest_reaching(
    target,
    head,
    candidates,
    counts,
    widest,
    IS_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The largest key from which on the weights reach the target; FIRST_KEY if none does."""
    head_weights = _weights(head, IS_MASS)
    found, step = tl.full([], FIRST_KEY, tl.int64), tl.full([], -FIRST_KEY, tl.int64)
    for _ in range(KEY_BITS):
        weight = _weight_from(
            found + step,
            head,
            head_weights,
            candidates,
            counts,
            widest,
            IS_MASS,
            CHUNK,
            CHUNKS,
            WIDTH,
        )
        found = tl.where(weight >= target, found + step, found)
        step = step >> 1
    return found


@triton.jit
def _threshold_kernel(
    settings,
    candidates,
    counts,
    masses,
    thresholds,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, chunks = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    top_k, top_p = load_setting(settings, TOP_K), load_setting(settings, TOP_P)
    threshold = tl.full([], FIRST_KEY, tl.int64)
    if load_setting(settings, BOUND) < float("inf"):
        inside = chunks < num_chunks
        sizes = tl.load(counts + row * num_chunks + chunks, mask=inside, other=0)
        widest, own = tl.max(sizes, axis=0), candidates + row * num_chunks * CHUNK
        head = load_candidates(own, sizes, 0, CHUNK, CHUNKS, WIDTH)
        if top_k > 0:
            threshold = _largest_reaching(
                top_k.to(tl.float64), head, own, sizes, widest, False, CHUNK, CHUNKS, WIDTH
            )
        if top_p < 1:
            if top_k > 0:
                mass = _weight_from(
                    threshold,
                    head,
                    _weights(head, True),
                    own,
                    sizes,
                    widest,
                    True,
                    CHUNK,
                    CHUNKS,
                    WIDTH,
                )
            else:
                mass = tl.sum(tl.load(masses + row * num_chunks + chunks, mask=inside, other=0.0))
            # At least one token, for p = 0 too.
            target = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)
            threshold = _largest_reaching(
                target, head, own, sizes, widest, True, CHUNK, CHUNKS, WIDTH
            )
    tl.store(thresholds + row, threshold)


def find_thresholds(logits: Tensor, settings: Tensor) -> Tensor:
    """logits [R, V] fp32, contiguous, and the rows' settings -> the worst key of z that is kept
    [R] int64; FIRST_KEY for rows without top-k and top-p."""
    rows, vocab_size = logits.shape
    chunks, device = num_chunks(vocab_size), logits.device
    candidates, counts = empty_candidates(rows, chunks, device)
    masses = torch.empty(rows, chunks, dtype=torch.float64, device=device)
    _gather_kernel[(rows, chunks)](
        logits, settings, candidates, counts, masses, vocab_size, CHUNK=CHUNK, num_warps=8
    )
    thresholds = torch.empty(rows, dtype=torch.int64, device=device)
    _threshold_kernel[(rows,)](
        *(settings, candidates, counts, masses, thresholds, chunks),
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        **pick(TABLE, device, rows),
    )
    return thresholds
