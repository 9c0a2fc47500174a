"""Products of a weight with one vector after the other, for a few tokens: what kernels share.

A program owns rows of the weight and holds them whole in registers: all of them are on their way
from memory before the first vector is needed, and are read once for all tokens. No tensor cores:
the memory is the limit. Rows are padded to a power of two without traffic. Decides no tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs)

import triton
import triton.language as tl

MOST_TOKENS = 8  # more would wait for one another; products of tiles take over
MOST_HIDDEN = 8192  # columns, where a program holds rows of gate and of up


@triton.jit
def load_rows(weight, row, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `row` [R] of weight [N, K] -> [R, WIDTH]; zero beyond the last column or row."""
    k = tl.arange(0, WIDTH)
    mask = (row < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + row.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def load_vector(x, K: tl.constexpr, WIDTH: tl.constexpr):
    """K numbers at x -> [1, WIDTH]. As a tile of one row: broadcast without a barrier."""
    k = tl.arange(0, WIDTH)[None, :]
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def dot_rows(rows, vector):
    """rows [R, WIDTH] times vector [1, WIDTH] -> [R] fp32."""
    return tl.sum(rows.to(tl.float32) * vector.to(tl.float32), 1)


@triton.jit
def normed_vector(
    x,
    residual,
    weight,
    total,
    eps,
    is_first,
    HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """RMSNorm of x + residual (pointers at K numbers) times weight [1, WIDTH], with the roundings
    of rms_norm.py -> [1, WIDTH] in x's dtype. One program, which `is_first`, stores the sum."""
    added = load_vector(x, K, WIDTH)
    if HAS_RESIDUAL:
        old = load_vector(residual, K, WIDTH)
        added = (old.to(tl.float32) + added.to(tl.float32)).to(added.dtype)
        k = tl.arange(0, WIDTH)[None, :]
        tl.store(total + k, added, mask=(k < K) & is_first)
    wide = added.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / K + eps)
    quotient = (wide * scale).to(added.dtype).to(tl.float32)
    return (quotient * weight.to(tl.float32)).to(added.dtype)
