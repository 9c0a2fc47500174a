"""The vocabulary head: logits = x @ weight.T, rounded to the dtype, then widened to fp32.

The rounding is the reference's; what reads logits (sampling, log-probabilities) works in fp32.
Never gathers over ranks: with a cut head the logits are this rank's share.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.products import add_product, empty_sum

# By the number of rows. K_BYTES: of a tile along the inner dimension, so that fp32 fits too.
TABLE = {
    (DEFAULT, 16): {"ROWS": 16, "COLUMNS": 64, "K_BYTES": 256, "num_warps": 4, "num_stages": 4},
    (DEFAULT, 32): {"ROWS": 32, "COLUMNS": 64, "K_BYTES": 256, "num_warps": 4, "num_stages": 4},
    (DEFAULT, 64): {"ROWS": 64, "COLUMNS": 64, "K_BYTES": 256, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 256): {"ROWS": 128, "COLUMNS": 128, "K_BYTES": 128, "num_warps": 8, "num_stages": 4},
    ("sm_90", 1): {"ROWS": 16, "COLUMNS": 64, "K_BYTES": 256, "num_warps": 4, "num_stages": 5},
    ("sm_90", 16): {"ROWS": 16, "COLUMNS": 128, "K_BYTES": 256, "num_warps": 4, "num_stages": 3},
    ("sm_90", 32): {"ROWS": 32, "COLUMNS": 128, "K_BYTES": 256, "num_warps": 4, "num_stages": 3},
    ("sm_90", 64): {"ROWS": 64, "COLUMNS": 128, "K_BYTES": 256, "num_warps": 4, "num_stages": 4},
    ("sm_90", 256): {"ROWS": 128, "COLUMNS": 256, "K_BYTES": 128, "num_warps": 8, "num_stages": 4},
}
CANDIDATES = [
    {
        "ROWS": rows,
        "COLUMNS": columns,
        "K_BYTES": k_bytes,
        "num_warps": warps,
        "num_stages": stages,
    }
    for rows, columns, warps in (
        *((16, 32, 4), (16, 64, 4), (16, 128, 4), (16, 128, 8)),
        *((32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8)),
    )
    for k_bytes in (128, 256)
    for stages in (3, 4, 5)
]


@triton.jit(do_not_specialize=["num_rows"])  # or a new size would compile anew
def _vocab_head_kernel(
    x,
    weight,
    logits,
    x_stride,
    weight_stride,
    num_rows,
    vocab_size,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,  # hidden is a multiple of INNER,
    PDL: tl.constexpr,
):
    """A program owns a tile of logits. Programs side by side in memory share the weight's rows."""
    wait_for_inputs(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_in, token_in = rows[:, None] < num_rows, tokens[:, None] < vocab_size
    inner = tl.arange(0, INNER)[None, :]
    x_at = x + rows[:, None].to(tl.int64) * x_stride + inner
    weight_at = weight + tokens[:, None].to(tl.int64) * weight_stride + inner
    total = empty_sum(ROWS, COLUMNS, x.dtype.element_ty)
    for start in range(0, hidden, INNER):
        left, right = row_in, token_in
        if not EVEN:
            left, right = left & (start + inner < hidden), right & (start + inner < hidden)
        a = tl.load(x_at + start, mask=left, other=0.0)
        b = tl.load(weight_at + start, mask=right, other=0.0)
        total = add_product(a, b.T, total)
    rounded = total.to(x.dtype.element_ty).to(tl.float32)
    to = logits + rows[:, None].to(tl.int64) * vocab_size + tokens[None, :]
    tl.store(to, rounded, mask=row_in & (tokens[None, :] < vocab_size))


def vocab_head_triton(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, H], weight [V, H], rows contiguous -> logits [R, V] fp32."""
    (num_rows, hidden), vocab_size = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.stride(1) == 1 and x.dtype == weight.dtype
    logits = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=x.device)
    options = dict(pick(TABLE, x.device, num_rows))
    inner = options.pop("K_BYTES") // x.element_size()
    grid = triton.cdiv(num_rows, options["ROWS"]), triton.cdiv(vocab_size, options["COLUMNS"])
    _vocab_head_kernel[grid](
        *(x, weight, logits, x.stride(0), weight.stride(0), num_rows, vocab_size, hidden),
        INNER=inner,
        EVEN=hidden % inner == 0,
        **options,
        **overlap(x.device),
    )
    return logits


def vocab_head_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, H], weight [V, H] -> logits [R, V] fp32 (fp64 if x is)."""
    return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))


IMPLEMENTATIONS = {"vocab_head": {"triton": vocab_head_triton, "torch": vocab_head_torch}}
