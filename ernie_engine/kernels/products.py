"""What products of tiles share: loading along the inner dimension, and adding one up.

Owns how roundings of a product in fp32 add up. Never decides tiles: an op's launch table does.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs)

import triton
import triton.language as tl


@triton.jit
def load_columns(rows, inside, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns start .. start + BLOCK_K - 1 of rows (pointers [R]) of length K: [R, BLOCK_K].

    Zero, and no traffic, for rows that are not `inside` and beyond the last column.
    """
    k = start + tl.arange(0, BLOCK_K)[None, :]
    mask = inside[:, None]
    if K % BLOCK_K != 0:
        mask = mask & (k < K)
    return tl.load(rows[:, None] + k, mask=mask, other=0.0)


@triton.jit
def add_product(a, b, total):
    """total + a @ b; total is fp32.

    fp32 operands are multiplied without tensor cores, one column after the other into one number.
    A tile's columns are summed apart before they join the total: of K roundings in one chain the
    last ones hit a sum of nearly K terms, and the error grows with sqrt(K); like this with
    sqrt(BLOCK_K) + sqrt(K / BLOCK_K), as a BLAS that splits K has it.
    """
    if a.dtype == tl.float32:
        # Any number but 0 keeps the compiler from making one chain of the sum and the product.
        part = tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
        return total + part
    else:
        return tl.dot(a, b, total, input_precision="ieee")
