"""Floats as integers that sort like them, with a place in the order for each of equal ones.

What routing, sampling and log-probabilities share. An order key is unique in its row: larger means
better, and of equal values the lower id is better. Keys are compared as the bits they are, so no
two computed copies of a value can disagree. Never sees NaN; ids are below MAX_IDS.
"""

import triton
import triton.language as tl

_ID_BITS = tl.constexpr(20)
_LAST_ID = tl.constexpr((1 << 20) - 1)
MAX_IDS = 1 << 20
FIRST_KEY = tl.constexpr(-(1 << 51))  # of 52 bits; no key is below; none of a number is equal


@triton.jit
def ordered_bits(values):
    """fp32 -> int32 that sort alike."""
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 is equal to 0.0
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards


@triton.jit
def float_of(ordered):
    """The inverse of ordered_bits, but for the sign of zero."""
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def order_keys(values, ids):
    """values fp32, ids, shapes that broadcast -> int64 keys."""
    return (ordered_bits(values).to(tl.int64) << _ID_BITS) + (_LAST_ID - ids)


@triton.jit
def key_ids(keys):
    """The ids that order_keys was given, int64."""
    return _LAST_ID - (keys & _LAST_ID)


@triton.jit
def key_values(keys):
    """The values that order_keys was given, but for the sign of zero."""
    return float_of((keys >> _ID_BITS).to(tl.int32))


@triton.jit
def kth_largest(values, k):
    """The k-th largest (k >= 1) of values [N] fp32, k <= N: a search bit by bit."""
    ordered = ordered_bits(values).to(tl.int64)
    found = tl.full([], -(1 << 31), tl.int64)
    step = tl.full([], 1 << 31, tl.int64)
    for _ in range(32):
        trial = found + step
        reached = tl.sum((ordered >= trial).to(tl.int32), axis=0) >= k
        found = tl.where(reached, trial, found)
        step = step >> 1
    return float_of(found.to(tl.int32))
