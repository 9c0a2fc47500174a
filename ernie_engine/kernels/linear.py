"""Dense product without a bias: y = x @ weight.T, rounded once to the dtype of x.

Never reduces over ranks: the parallel layers do that with what comes out.

One token or two: a program holds some rows of the weight and multiplies (gemv.py). More, but few:
reading the weight is still the cost. It is the left operand of a product of tiles, so that its rows
fill the tensor cores' tile and the tokens its narrow side. A weight with few rows is cut along K as
well, into parts whose sums the last program of a tile adds in order; into how many depends on the
weight's shape alone. Many tokens: cuBLAS. Which of the three, tables by tokens say.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.gemv import MOST_TOKENS, dot_rows, load_rows, load_vector
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.products import add_product, empty_sum, load_columns
from ernie_engine.kernels.tickets import is_last, tickets

# By tokens: 1 = cuBLAS. QKV of 21B on an H100: 10.9 us with the kernel at 64 tokens, 11.1 us with
# cuBLAS at 256.
LIBRARY = {(DEFAULT, 64): {"LIBRARY": 0}, (DEFAULT, 65): {"LIBRARY": 1}}
LIBRARY_CANDIDATES = [{"LIBRARY": 0}, {"LIBRARY": 1}]
# By tokens.
TABLE = {
    (DEFAULT, 16): {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 128, "num_warps": 2, "num_stages": 3},
    (DEFAULT, 32): {"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5},
    ("sm_90", 32): {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5},
    ("sm_90", 64): {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5},
}
CANDIDATES = [
    {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for n, m, warps in (
        *((16, 8, 1), (16, 8, 2), (32, 8, 2), (32, 8, 4), (64, 8, 4)),
        *((16, 16, 1), (32, 16, 2), (32, 16, 4), (64, 16, 4), (32, 32, 2), (32, 32, 4)),
        *((64, 32, 4), (128, 32, 4), (32, 64, 4), (64, 64, 4), (128, 64, 4), (128, 64, 8)),
    )
    for k, stages in ((64, 4), (64, 6), (128, 3), (128, 5), (256, 3), (256, 4))
]
# Products of fp32 run without tensor cores: tiles of operands must fit into registers.
TABLE_FP32 = {
    (DEFAULT, 64): {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
}
# By tokens: 1 = rows held by a program, not tiles.
FEW = {(DEFAULT, 2): {"FEW": 1}, (DEFAULT, 3): {"FEW": 0}}
FEW_CANDIDATES = [{"FEW": 1}, {"FEW": 0}]
# By columns. BLOCK_N: rows of a program.
ROWS_TABLE = {
    (DEFAULT, 1024): {"BLOCK_N": 16, "num_warps": 4},
    (DEFAULT, 4096): {"BLOCK_N": 8, "num_warps": 8},
    (DEFAULT, 16384): {"BLOCK_N": 2, "num_warps": 8},
    ("sm_90", 1024): {"BLOCK_N": 4, "num_warps": 2},
    ("sm_90", 2048): {"BLOCK_N": 4, "num_warps": 4},
    ("sm_90", 2560): {"BLOCK_N": 1, "num_warps": 2},
    ("sm_90", 3072): {"BLOCK_N": 2, "num_warps": 4},
    ("sm_90", 16384): {"BLOCK_N": 1, "num_warps": 8},
}
ROWS_CANDIDATES = [
    {"BLOCK_N": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16) for warps in (2, 4, 8)
]
MOST_COLUMNS = 16384  # of a row that a program holds
SPLIT_ROWS, SPLIT_PROGRAMS, SPLIT_MIN_K = 32, 128, 256  # see num_splits


def num_splits(num_rows: int, inner: int) -> int:
    """Into how many parts K is cut: until there are programs for most of a card's multiprocessors
    (at SPLIT_ROWS rows each), while a part keeps SPLIT_MIN_K columns. A power of two."""
    splits, programs = 1, triton.cdiv(num_rows, SPLIT_ROWS)
    while programs * splits < SPLIT_PROGRAMS and inner >= 2 * splits * SPLIT_MIN_K:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    weight,
    y,
    parts,
    tickets,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, K], weight [N, K] -> y [T, N]. A program has one of SPLITS ranges of K, whose products
    wait in parts [SPLITS, T, N]."""
    wait_for_inputs(PDL)
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight_rows, x_rows = weight + row.to(tl.int64) * K, x + token * K
    PER_SPLIT: tl.constexpr = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    first = split * PER_SPLIT
    acc = empty_sum(BLOCK_N, BLOCK_M, x.dtype.element_ty)
    for start in tl.range(first, tl.minimum(first + PER_SPLIT, K), BLOCK_K):
        w_tile = load_columns(weight_rows, row < N, start, K, BLOCK_K)
        x_tile = load_columns(x_rows, token < num_tokens, start, K, BLOCK_K)
        acc = add_product(w_tile, tl.trans(x_tile), acc)
    places = token[None, :] * N + row[:, None]
    inside = (row < N)[:, None] & (token < num_tokens)[None, :]
    if SPLITS == 1:
        tl.store(y + places, acc.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(parts + split * num_tokens * N + places, acc.to(tl.float32), mask=inside)
        if is_last(tickets + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), SPLITS):
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(SPLITS):
                at = parts + part * num_tokens * N + places
                total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _rows_kernel(
    x,
    weight,
    y,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, K], weight [N, K] -> y [T, N]: BLOCK_N rows of the weight times every token."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = load_rows(weight, row, N, K, WIDTH)
    wait_for_inputs(PDL)
    for token in tl.range(0, num_tokens):
        value = dot_rows(rows, load_vector(x + token * K, K, WIDTH))
        tl.store(y + token * N + row, value.to(y.dtype.element_ty), mask=row < N)


def few_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Up to MOST_TOKENS tokens and MOST_COLUMNS columns. All tensors contiguous."""
    (num_tokens, inner), num_rows = x.shape, len(weight)
    assert x.is_contiguous() and weight.is_contiguous()
    assert num_tokens <= MOST_TOKENS and inner <= MOST_COLUMNS
    y = x.new_empty(num_tokens, num_rows)
    if y.numel() == 0:
        return y
    launch = pick(ROWS_TABLE, x.device, inner)
    _rows_kernel[(triton.cdiv(num_rows, launch["BLOCK_N"]),)](
        *(x, weight, y, num_tokens),
        N=num_rows,
        K=inner,
        WIDTH=triton.next_power_of_2(inner),
        **launch,
        **overlap(x.device),
    )
    return y


def small_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel at any number of tokens, whatever LIBRARY says. All tensors contiguous."""
    (num_tokens, inner), num_rows = x.shape, len(weight)
    assert x.is_contiguous() and weight.is_contiguous()
    y = x.new_empty(num_tokens, num_rows)
    if y.numel() == 0:
        return y
    launch = pick(TABLE_FP32 if x.dtype == torch.float32 else TABLE, x.device, num_tokens)
    splits = num_splits(num_rows, inner)
    grid = (
        triton.cdiv(num_rows, launch["BLOCK_N"]),
        triton.cdiv(num_tokens, launch["BLOCK_M"]),
        splits,
    )
    parts, counters = y, y
    if splits > 1:
        shape = splits, num_tokens, num_rows
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = tickets("linear", x.device)
        assert grid[0] * grid[1] <= len(counters)
    _linear_kernel[grid](
        *(x, weight, y, parts, counters, num_tokens),
        N=num_rows,
        K=inner,
        SPLITS=splits,
        **launch,
        **overlap(x.device),
    )
    return y


def linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K], contiguous -> [T, N]."""
    if pick(LIBRARY, x.device, len(x))["LIBRARY"]:
        return F.linear(x, weight)
    few = pick(FEW, x.device, len(x))["FEW"] and x.shape[1] <= MOST_COLUMNS
    return few_linear(x, weight) if few else small_linear(x, weight)


def linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]."""
    return F.linear(x, weight)


IMPLEMENTATIONS = {"linear": {"triton": linear_triton, "torch": linear_torch}}
