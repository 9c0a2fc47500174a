"""Where top-k and top-p cut a row: the worst order key that they keep, found without a sort.

    z = (logit - best logit) / temperature, and -inf where z < log(min_p)
    top-k keeps the k best keys of z; top-p the fewest of those, best first, whose mass reaches
    p * (the mass of those), a mass being exp(z) in fp64

Both ask for the largest key from which on the weights of all better ones reach a target: weights of
1 and a target of k, or masses. It is found bit by bit, among the candidates of candidates.py. With
top-p alone, tokens of z < log((1 - p) / V) have less mass than 1 - p together, and the best token
has mass 1: none of them can be kept, and they count in the whole mass only.
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
from ernie_engine.kernels.ordering import (
    FIRST_KEY,
    KEY_BITS,
    MAX_IDS,
    key_ids,
    key_values,
    kth_largest,
    order_keys,
)

# What is known of a row, a line of fp32 [R, NUM_SETTINGS]. A token whose z is below the bound is
# kept by no filter; an infinite bound: the row has no filter.
NUM_SETTINGS = 6
TEMPERATURE, TOP_K, TOP_P, BEST, FLOOR, BOUND = (tl.constexpr(i) for i in range(NUM_SETTINGS))
_LINE = tl.constexpr(NUM_SETTINGS)
_MAX_IDS = tl.constexpr(MAX_IDS)
_MARGIN = tl.constexpr(0.01)  # of the bound for top-p; fp32 is off by far less


@triton.jit
def load_setting(settings, which: tl.constexpr):
    """Of this program's row."""
    return tl.load(settings + tl.program_id(0) * _LINE + which)


@triton.jit
def scaled_logits(logits, settings):
    """z, with the bits of the twin."""
    z = logits - load_setting(settings, BEST)
    z = tl.div_rn(z, load_setting(settings, TEMPERATURE))
    return tl.where(z < load_setting(settings, FLOOR), -float("inf"), z)


@triton.jit
def _settings_kernel(
    best_keys,
    group_maxima,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    settings,
    greedy,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    vocab_size,
    num_chunks,
    num_groups,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The greedy token of a row, and its settings."""
    row = tl.program_id(0).to(tl.int64)
    chunks, groups = tl.arange(0, CHUNKS), tl.arange(0, GROUPS)
    keys = tl.load(best_keys + row * num_chunks + chunks, mask=chunks < num_chunks, other=FIRST_KEY)
    best_key = tl.max(keys, axis=0)
    tl.store(greedy + row, key_ids(best_key))
    best = key_values(best_key)
    temperature = tl.load(temperatures + row * temperature_stride)
    top_k = tl.minimum(tl.load(top_ks + row * top_k_stride), _MAX_IDS).to(tl.float32)
    top_p = tl.load(top_ps + row * top_p_stride)
    floor = tl.log(tl.load(min_ps + row * min_p_stride).to(tl.float64)).to(tl.float32)
    bound = tl.full([], float("inf"), tl.float32)
    if temperature > 0:
        if top_k > num_groups:
            bound = tl.full([], -float("inf"), tl.float32)
        elif top_k > 0:
            inside = groups < num_groups
            maxima = group_maxima + row * num_groups + groups
            values = tl.load(maxima, mask=inside, other=-float("inf"))
            bound = tl.div_rn(kth_largest(values, top_k) - best, temperature)
        elif top_p < 1:
            bound = tl.log((1.0 - top_p) / vocab_size) - _MARGIN
    line = settings + row * _LINE
    tl.store(line + TEMPERATURE, temperature)
    tl.store(line + TOP_K, top_k)
    tl.store(line + TOP_P, top_p)
    tl.store(line + BEST, best)
    tl.store(line + FLOOR, floor)
    tl.store(line + BOUND, bound)


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


def find_thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as sample's, logits contiguous -> (greedy token [R] int64, settings
    [R, NUM_SETTINGS] fp32, the worst key of z that is kept [R] int64)."""
    rows, vocab_size = logits.shape
    device = logits.device
    best_keys, group_maxima = find_maxima(logits)
    chunks, groups = best_keys.shape[1], group_maxima.shape[1]
    settings = torch.empty(rows, NUM_SETTINGS, dtype=torch.float32, device=device)
    greedy, thresholds = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    columns = temperature, top_k, top_p, min_p
    chunks_2, groups_2 = triton.next_power_of_2(chunks), triton.next_power_of_2(groups)
    _settings_kernel[(rows,)](
        *(best_keys, group_maxima, *columns, settings, greedy),
        *(*(column.stride(0) for column in columns), vocab_size, chunks, groups),
        CHUNKS=chunks_2,
        GROUPS=groups_2,
    )
    candidates, counts = empty_candidates(rows, chunks, device)
    masses = torch.empty(rows, chunks, dtype=torch.float64, device=device)
    _gather_kernel[(rows, chunks)](
        logits, settings, candidates, counts, masses, vocab_size, CHUNK=CHUNK, num_warps=8
    )
    _threshold_kernel[(rows,)](
        *(settings, candidates, counts, masses, thresholds, chunks),
        CHUNK=CHUNK,
        CHUNKS=chunks_2,
        WIDTH=WIDTH,
        num_warps=16,
    )
    return greedy, settings, thresholds
