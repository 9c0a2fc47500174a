"""Where top-k and top-p cut a row: the worst order key that they keep, found without a sort.

Top-k keeps the k best keys of z (row_settings.py); top-p the fewest of those, best first, whose
mass reaches p * (the mass of those), a mass being exp(z) in fp64. Both ask for the largest key from
which on the weights of all better ones reach a target: weights of 1 and a target of k, or masses.
It is found bit by bit, until one is left, among the tokens where it can be: for top-k those that
reach the row's bound; for top-p alone those between two edges, of which the masses beyond say that
the target lies there.
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
from ernie_engine.kernels.ordering import FIRST_KEY, key_values, order_keys
from ernie_engine.kernels.row_settings import BOUND, TOP_K, TOP_P, load_setting, scaled_logits

EDGES = 32
BITS_AT_ONCE = tl.constexpr(4)  # of a key, until it is looked at how many keys are left
_SLACK = tl.constexpr(1e-9)  # sums in fp64 in another order are off by far less

# By the number of rows. WIDTH: candidates of every chunk that are held in registers.
TABLE = {
    (DEFAULT, 256): {"WIDTH": 64, "num_warps": 16},
    ("sm_90", 256): {"WIDTH": 32, "num_warps": 8},
}
CANDIDATES = [
    {"WIDTH": width, "num_warps": warps} for width in (32, 64, 128) for warps in (4, 8, 16)
]


@triton.jit
def _edge(i, EDGES: tl.constexpr):
    """A z from 0 down to -14, close together where tokens weigh most; the last is below all."""
    return tl.where(i == EDGES - 1, -float("inf"), i * i * (-16.0 / (EDGES * EDGES)))


@triton.jit
def _is_top_p_alone(settings):
    has_filter = load_setting(settings, BOUND) < float("inf")
    return has_filter & (load_setting(settings, TOP_K) == 0)


@triton.jit
def _masses_kernel(logits, settings, masses, vocab_size, CHUNK: tl.constexpr, EDGES: tl.constexpr):
    """For top-p alone: the mass of a chunk's tokens from each edge on."""
    if _is_top_p_alone(settings):
        z = scaled_logits(load_logits(logits, chunk_ids(CHUNK), vocab_size), settings)
        mass = tl.exp(z.to(tl.float64))
        for i in range(EDGES):
            beyond = tl.sum(tl.where(z >= _edge(i, EDGES), mass, 0.0), axis=0)
            tl.store(masses + chunk_at() * EDGES + i, beyond)


@triton.jit
def _masses_beyond(masses, num_chunks, CHUNKS: tl.constexpr, EDGES: tl.constexpr):
    """Of the row, from each edge on: [EDGES] fp64, the last the whole."""
    chunks, i = tl.arange(0, CHUNKS)[:, None], tl.arange(0, EDGES)[None, :]
    at = (tl.program_id(0).to(tl.int64) * num_chunks + chunks) * EDGES + i
    return tl.sum(tl.load(masses + at, mask=chunks < num_chunks, other=0.0), axis=0)


@triton.jit
def _target_mass(top_p, whole):
    """At least one token, for p = 0 too."""
    return tl.maximum(top_p.to(tl.float64) * whole, 1e-300)


@triton.jit
def _gather_kernel(
    logits,
    settings,
    masses,
    candidates,
    counts,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
):
    """The tokens of a chunk of which one may be the worst that is kept."""
    bound = load_setting(settings, BOUND)
    if bound < float("inf"):
        above = tl.full([], float("inf"), tl.float32)
        if _is_top_p_alone(settings):
            beyond = _masses_beyond(masses, num_chunks, CHUNKS, EDGES)
            target = _target_mass(load_setting(settings, TOP_P), tl.max(beyond, axis=0))
            edges = _edge(tl.arange(0, EDGES), EDGES)
            enough = beyond >= target * (1 + _SLACK)
            bound = tl.max(tl.where(enough, edges, -float("inf")), axis=0)
            too_little = beyond < target * (1 - _SLACK)
            above = tl.min(tl.where(too_little, edges, float("inf")), axis=0)
        ids = chunk_ids(CHUNK)
        z = scaled_logits(load_logits(logits, ids, vocab_size), settings)
        wanted = (z >= bound) & (z < above) & (z > -float("inf"))
        store_candidates(order_keys(z, ids), wanted, candidates, counts, CHUNK)


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
def _ends(
    first,
    last,
    head,
    candidates,
    counts,
    widest,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The least and the greatest of the keys first .. last, of which there is at least one."""
    inside = (head > FIRST_KEY) & (head >= first) & (head <= last)
    least = tl.min(tl.where(inside, head, -FIRST_KEY))
    greatest = tl.max(tl.where(inside, head, FIRST_KEY))
    for start in range(WIDTH, widest, WIDTH):
        keys = load_candidates(candidates, counts, start, CHUNK, CHUNKS, WIDTH)
        inside = (keys > FIRST_KEY) & (keys >= first) & (keys <= last)
        least = tl.minimum(least, tl.min(tl.where(inside, keys, -FIRST_KEY)))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, keys, FIRST_KEY)))
    return least, greatest


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
    """The largest key from which on the weights reach the target; FIRST_KEY if none does.

    It is in found .. found + 2 step - 1. Bits that all keys there share are known, and with one key
    there it is that.
    """
    head_weights = _weights(head, IS_MASS)
    found = tl.full([], FIRST_KEY, tl.int64)
    whole = _weight_from(
        *(found, head, head_weights, candidates, counts, widest, IS_MASS, CHUNK, CHUNKS, WIDTH)
    )
    step = tl.where(whole >= target, -found, 0)  # half of all keys, or there is nothing to find
    while step > 0:
        least, greatest = _ends(
            *(found, found + 2 * step - 1, head, candidates, counts, widest, CHUNK, CHUNKS, WIDTH)
        )
        place = least - FIRST_KEY
        differing = place ^ (greatest - FIRST_KEY)
        while (step > 0) & ((differing & step) == 0):
            step = step >> 1
        open_bits = tl.where(step > 0, 2 * step - 1, 0)
        found = FIRST_KEY + (place & ~open_bits)
        for _ in range(BITS_AT_ONCE):
            weight = _weight_from(
                *(found + step, head, head_weights, candidates, counts, widest),
                *(IS_MASS, CHUNK, CHUNKS, WIDTH),
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
    EDGES: tl.constexpr,
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
                target = _target_mass(top_p, mass)
            else:
                beyond = _masses_beyond(masses, num_chunks, CHUNKS, EDGES)
                target = _target_mass(top_p, tl.max(beyond, axis=0))
                # What is better than all candidates.
                target -= tl.max(tl.where(beyond < target * (1 - _SLACK), beyond, 0.0), axis=0)
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
    masses = torch.empty(rows, chunks, EDGES, dtype=torch.float64, device=device)
    _masses_kernel[(rows, chunks)](
        logits, settings, masses, vocab_size, CHUNK=CHUNK, EDGES=EDGES, num_warps=4
    )
    chunks_2 = triton.next_power_of_2(chunks)
    _gather_kernel[(rows, chunks)](
        *(logits, settings, masses, candidates, counts, vocab_size, chunks),
        CHUNK=CHUNK,
        CHUNKS=chunks_2,
        EDGES=EDGES,
        num_warps=4,
    )
    thresholds = torch.empty(rows, dtype=torch.int64, device=device)
    _threshold_kernel[(rows,)](
        *(settings, candidates, counts, masses, thresholds, chunks),
        CHUNK=CHUNK,
        CHUNKS=chunks_2,
        EDGES=EDGES,
        **pick(TABLE, device, rows),
    )
    return thresholds
