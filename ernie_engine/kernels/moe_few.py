"""The routed experts for a few tokens, without sorting: see moe.py for the maths.

A program owns output rows and reads the weights of one choice after the other, each once; two
tokens that chose the same expert read it twice. No tensor cores: with one token there is nothing
to multiply a tile by, and the memory is the limit. Never synchronises with the host.
"""

# pyright: reportArgumentType=false
# (a launch gives ints where a kernel has constexprs)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.launch import DEFAULT, pick

# By tokens. Not measured yet. BLOCK: output rows of a program (of gate and of up each, in the
# first launch); BLOCK_K: columns read at once; STAGES: loads in flight.
GATE_UP_TABLE = {
    (DEFAULT, 8): {"BLOCK": 8, "BLOCK_K": 256, "STAGES": 3, "num_warps": 4},
    ("sm_90", 8): {"BLOCK": 8, "BLOCK_K": 512, "STAGES": 4, "num_warps": 4},
}
DOWN_TABLE = {
    (DEFAULT, 8): {"BLOCK": 8, "BLOCK_K": 256, "STAGES": 2, "num_warps": 4},
    ("sm_90", 8): {"BLOCK": 8, "BLOCK_K": 512, "STAGES": 3, "num_warps": 4},
}
# A stage of fp32 is twice as large: with three, a whole row of 3584 columns leaves no room.
DOWN_TABLE_FP32 = {(DEFAULT, 8): {"BLOCK": 8, "BLOCK_K": 256, "STAGES": 2, "num_warps": 4}}
# For either launch.
CANDIDATES = [
    {"BLOCK": block, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
    for block in (4, 8, 16)
    for k in (256, 512, 1024)
    for stages in (2, 3, 4)
    for warps in (2, 4, 8)
]


@triton.jit
def silu_product(gate, up, DTYPE: tl.constexpr):
    """swiglu of two fp32 sums with the twin's roundings: both sums, the silu, the product."""
    gate = gate.to(DTYPE).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(DTYPE).to(tl.float32)
    return (silu * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _gate_up_kernel(
    x,
    gate_up,
    ids,
    hidden,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [T, H], gate_up [E, 2 I, H] -> hidden [T k, I]: one choice of a token, BLOCK rows."""
    entry = tl.program_id(1)
    expert = tl.load(ids + entry).to(tl.int64) - first_expert
    if (expert < 0) | (expert >= NUM_EXPERTS):  # another rank's; nobody reads its hidden row
        return
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Rows outside are read twice instead of masked; only the store needs a mask.
    gate_rows = gate_up + (expert * (2 * I) + tl.minimum(row, I - 1))[:, None] * H
    x_row = x + entry // TOP_K * H
    gate = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x_part = tl.load(x_row + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        k = k[None, :]
        gate += tl.load(gate_rows + k, mask=k < H, other=0.0).to(tl.float32) * x_part
        up += tl.load(gate_rows + I * H + k, mask=k < H, other=0.0).to(tl.float32) * x_part
    y = silu_product(tl.sum(gate, 1), tl.sum(up, 1), hidden.dtype.element_ty)
    tl.store(hidden + entry.to(tl.int64) * I + row, y, mask=row < I)


@triton.jit
def _down_kernel(
    hidden,
    down,
    weights,
    ids,
    out,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """hidden [T k, I], down [E, H, I], weights, ids [T, k] -> out [T, H]: BLOCK of a row."""
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    read = tl.minimum(row, H - 1)
    total = tl.zeros([BLOCK], tl.float32)
    # A loop that stays rolled, over choices: the next one's weights are on the way meanwhile.
    for choice in tl.range(0, TOP_K, num_stages=STAGES):
        entry = token * TOP_K + choice
        expert = tl.load(ids + entry).to(tl.int64) - first_expert
        ours = (expert >= 0) & (expert < NUM_EXPERTS)
        down_rows = down + (expert * H + read)[:, None] * I
        acc = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for start in tl.static_range(0, I, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = ours & (k < I)
            part = tl.load(hidden + entry * I + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            k, inside = k[None, :], inside[None, :]
            acc += tl.load(down_rows + k, mask=inside, other=0.0).to(tl.float32) * part
        y = tl.sum(acc, 1).to(out.dtype.element_ty).to(tl.float32)
        weighted = (y * tl.load(weights + entry).to(tl.float32)).to(out.dtype.element_ty)
        total += tl.where(ours, weighted.to(tl.float32), 0.0)
    tl.store(out + token * H + row, total.to(out.dtype.element_ty), mask=row < H)


def moe_experts_few(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, first_expert: int = 0
) -> Tensor:
    """As the twin, all tensors contiguous, with at least one token."""
    (num_tokens, hidden_size), top_k = x.shape, ids.shape[1]
    num_experts, _, width = down.shape
    shape = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "H": hidden_size, "I": width}
    hidden, out = x.new_empty(ids.numel(), width), torch.empty_like(x)
    launch = pick(GATE_UP_TABLE, x.device, num_tokens)
    grid = triton.cdiv(width, launch["BLOCK"]), ids.numel()
    _gate_up_kernel[grid](x, gate_up, ids, hidden, first_expert, **shape, **launch)
    table = DOWN_TABLE_FP32 if x.dtype == torch.float32 else DOWN_TABLE
    launch = pick(table, x.device, num_tokens)
    grid = triton.cdiv(hidden_size, launch["BLOCK"]), num_tokens
    _down_kernel[grid](hidden, down, weights, ids, out, first_expert, **shape, **launch)
    return out
