"""SwiGLU: y = silu(gate) * up, with silu(z) = z / (1 + exp(-z)).

silu is fp32 inside and rounded to the dtype before the product, which is rounded again: two
roundings, as the reference has them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs

# By the number of tokens: few tokens want many small programs.
TABLE = {
    (DEFAULT, 64): {"BLOCK": 512, "num_warps": 4},
    (DEFAULT, 16384): {"BLOCK": 2048, "num_warps": 8},
    ("sm_90", 1): {"BLOCK": 256, "num_warps": 8},
    ("sm_90", 64): {"BLOCK": 512, "num_warps": 4},
    ("sm_90", 1024): {"BLOCK": 512, "num_warps": 2},
    ("sm_90", 16384): {"BLOCK": 1024, "num_warps": 8},
}
CANDIDATES = [
    {"BLOCK": block, "num_warps": warps} for block in (256, 512, 1024, 2048) for warps in (2, 4, 8)
]


@triton.jit
def _swiglu_kernel(gate_up, y, stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside)
    z = gate.to(tl.float32)
    silu = tl.div_rn(z, 1.0 + tl.exp(-z)).to(gate.dtype)
    # The fp32 product of two half-precision numbers is exact: one rounding, at the store.
    tl.store(y + row * width + columns, silu.to(tl.float32) * up.to(tl.float32), mask=inside)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gate in the first half, rows contiguous -> [T, I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    options = pick(TABLE, gate_up.device, rows)
    grid = rows, triton.cdiv(width, options["BLOCK"])
    _swiglu_kernel[grid](gate_up, y, gate_up.stride(0), width, **options, **overlap(gate_up.device))
    return y


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gate in the first half -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


IMPLEMENTATIONS = {"swiglu": {"triton": swiglu_triton, "torch": swiglu_torch}}
