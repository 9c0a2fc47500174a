"""Philox4x32-10, a counter-based random generator, and the Gumbel noise drawn from it.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). No state: a number is a
function of its key and counter alone, so a draw is the same on every device, at every place in
a batch and on every rank. Written in int64 operations, which CPU and GPU compute alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

Word = Tensor | int  # a 32-bit unsigned value; a tensor holds it in int64
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Ten rounds over four counter words and two key words (ints or int64 tensors that
    broadcast, each value in 0 .. 2^32 - 1) -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # wraps in int64; the bits are right
        c0, c1 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, first_token: int = 0) -> Tensor:
    """Standard Gumbel noise for tokens first_token .. first_token + vocab_size - 1.

    seeds, positions [R] int64 -> [R, vocab_size] fp32. Key: the seed's low and high word;
    counter: (token id, the position's low and high word, 0); of the result, word 0. With
    u = (word + 0.5) / 2^32 the noise is -log(-log u). In fp64, so that the logarithms of CPU and
    GPU round alike; all 32 bits count, or the tail, where winners are, would be cut short.
    """
    tokens = torch.arange(first_token, first_token + vocab_size, device=seeds.device)
    seeds, positions = seeds[:, None], positions[:, None]
    counter = (tokens[None], positions & MASK, positions >> 32 & MASK, 0)
    word = philox4x32(counter, (seeds & MASK, seeds >> 32 & MASK))[0]  # [R, V]
    assert isinstance(word, Tensor)
    uniform = (word.double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log().float()


_MASK = tl.constexpr(MASK)
_M0, _M1 = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
_STEP0, _STEP1 = (tl.constexpr(step) for step in KEY_STEPS)


@triton.jit
def gumbel_noise_of(tokens, position, seed):
    """gumbel_noise() inside a kernel: tokens [N], position and seed int64 -> [N] fp32."""
    c0, c1, c2 = tokens.to(tl.int64), position & _MASK, (position >> 32) & _MASK
    c1, c2 = c1 + tl.zeros_like(c0), c2 + tl.zeros_like(c0)
    c3, k0, k1 = tl.zeros_like(c0), seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _STEP0) & _MASK, (k1 + _STEP1) & _MASK
    uniform = (c0.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return -tl.log(-tl.log(uniform)).to(tl.float32)
