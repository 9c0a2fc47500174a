"""What products of tiles share: loading along the inner dimension, and adding one up.

Owns how roundings of a product in fp32 add up. Never decides tiles: an op's launch table does.
A sum of products lives in empty_sum(), grows by add_product() and is rounded by whoever stores it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs)

import triton
import triton.language as tl

ANYWHERE = tl.constexpr("")
PAST_L1 = tl.constexpr(".cg")  # for what was there before wait_for_inputs()


@triton.jit
def load_columns(
    rows,
    inside,
    start,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CACHE: tl.constexpr = ANYWHERE,
):
    """Columns start .. start + BLOCK_K - 1 of rows (pointers [R]) of length K: [R, BLOCK_K].

    Zero, and no traffic, for rows that are not `inside` and beyond the last column.
    """
    k = start + tl.arange(0, BLOCK_K)[None, :]
    mask = inside[:, None]
    if K % BLOCK_K != 0:
        mask = mask & (k < K)
    return tl.load(rows[:, None] + k, mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def empty_sum(ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Zeros [ROWS, COLUMNS] that hold a sum of products of `dtype`: fp32, of fp32 fp64."""
    return tl.zeros([ROWS, COLUMNS], tl.float64 if dtype == tl.float32 else tl.float32)


@triton.jit
def add_product(a, b, total):
    """total + a @ b; total is an empty_sum() of their dtype, or what this gave before.

    fp32 operands are multiplied without tensor cores, one column after the other into one number,
    and of K roundings in one chain the last ones hit a sum of nearly K terms. So a tile's columns
    are summed apart, in fp32, and tiles in fp64: one addition for BLOCK_K products.
    """
    if a.dtype == tl.float32:
        return total + tl.dot(a, b, input_precision="ieee").to(tl.float64)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def add_exact_product(a, b, total, IN_PARTS: tl.constexpr):
    """total + a @ b for fp32 a and b of any dtype, as exact as a sum in fp32 is.

    IN_PARTS, for bf16 b, uses tensor cores: three parts of a, 8 bits of it each, hold all its 24
    bits, and the product of two numbers of 8 bits is exact in fp32. Smallest first.
    """
    if IN_PARTS:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        part = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))
        return total + part
    else:
        return total + tl.dot(a, b.to(tl.float32), input_precision="ieee").to(total.dtype)
