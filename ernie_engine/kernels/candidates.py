"""The tokens of a row that may be among its best, found without sorting the row.

A row of logits is cut into chunks, a program for each. The largest logits of groups of tokens
bound the k-th largest of all from below: what does not reach the bound is out. The others, mostly
few more than k, are kept as order keys, chunk by chunk, so that whoever looks for the best among
them meets them in one order only. Decides nothing: see top_filter.py and logprobs.py.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.ordering import FIRST_KEY, MAX_IDS, order_keys

CHUNK = 2048  # tokens of a program
GROUP = 128  # tokens of a maximum
WIDTH = 64  # candidates of every chunk that are looked at together


def num_chunks(vocab_size: int) -> int:
    assert vocab_size <= MAX_IDS
    return -(-vocab_size // CHUNK)


@triton.jit
def chunk_ids(CHUNK: tl.constexpr):
    """The tokens of this program [CHUNK], some of them beyond the vocabulary."""
    return tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def load_logits(logits, ids, vocab_size):
    """This program's row, at `ids`; -inf beyond the vocabulary."""
    at = logits + tl.program_id(0).to(tl.int64) * vocab_size + ids
    return tl.load(at, mask=ids < vocab_size, other=-float("inf"))


@triton.jit
def chunk_at():
    """The place of this program's chunk among all chunks of all rows."""
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _maxima_kernel(
    logits, best_keys, group_maxima, vocab_size, CHUNK: tl.constexpr, GROUP: tl.constexpr
):
    ids = chunk_ids(CHUNK)
    z = load_logits(logits, ids, vocab_size)
    keys = tl.where(ids < vocab_size, order_keys(z, ids), FIRST_KEY)
    tl.store(best_keys + chunk_at(), tl.max(keys, axis=0))
    maxima = tl.max(tl.reshape(z, [CHUNK // GROUP, GROUP]), axis=1)
    groups = tl.arange(0, CHUNK // GROUP)
    tl.store(group_maxima + chunk_at() * (CHUNK // GROUP) + groups, maxima)


def find_maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V] fp32, contiguous -> the best order key of each of S chunks [R, S] int64, and
    the largest logit of each group of GROUP tokens [R, S * CHUNK / GROUP] fp32."""
    rows, vocab_size = logits.shape
    chunks, device = num_chunks(vocab_size), logits.device
    best_keys = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    groups = chunks * (CHUNK // GROUP)
    group_maxima = torch.empty(rows, groups, dtype=torch.float32, device=device)
    _maxima_kernel[(rows, chunks)](
        logits, best_keys, group_maxima, vocab_size, CHUNK=CHUNK, GROUP=GROUP, num_warps=4
    )
    return best_keys, group_maxima


def empty_candidates(rows: int, chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the candidates of every chunk, and their numbers."""
    keys = torch.empty(rows, chunks, CHUNK, dtype=torch.int64, device=device)
    return keys, torch.empty(rows, chunks, dtype=torch.int32, device=device)


@triton.jit
def store_candidates(keys, wanted, candidates, counts, CHUNK: tl.constexpr):
    """Keep this program's wanted keys [CHUNK], in their order, and their number."""
    place = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    tl.store(candidates + chunk_at() * CHUNK + place, keys, mask=wanted)
    tl.store(counts + chunk_at(), tl.sum(wanted.to(tl.int32), axis=0))


@triton.jit
def load_candidates(
    candidates, counts, start, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):
    """Candidates start .. start + WIDTH - 1 of all chunks [CHUNKS, WIDTH]; FIRST_KEY for none.

    `candidates` points at the row's first; counts [CHUNKS].
    """
    places = start + tl.arange(0, WIDTH)[None, :]
    at = tl.arange(0, CHUNKS)[:, None] * CHUNK + places
    return tl.load(candidates + at, mask=places < counts[:, None], other=FIRST_KEY)
