"""The experts for a few tokens, without sorting: see moe.py for the maths.

A program owns output rows and reads the weights of a token's choices, each once; two tokens that
chose the same expert read it twice. The shared experts, as wide as some routed ones together, are
read as so many more choices, by the same launches. No tensor cores: with one token there is nothing
to multiply a tile by, and the memory is the limit. Never synchronises with the host.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (a launch gives ints where a kernel has constexprs, and types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.gemv import dot_rows, load_vector
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs

# BLOCK: output rows of a program (of gate and of up each, in the first launch); BLOCK_K: columns
# read at once; STAGES: loads in flight. The first by hidden size, the second by tokens x width.
GATE_UP_TABLE = {
    (DEFAULT, 8192): {"BLOCK": 8, "BLOCK_K": 256, "STAGES": 3, "num_warps": 4},
    ("sm_90", 4096): {"BLOCK": 2, "BLOCK_K": 4096, "STAGES": 1, "num_warps": 2},
    ("sm_90", 8192): {"BLOCK": 1, "BLOCK_K": 4096, "STAGES": 1, "num_warps": 8},
}
GATE_UP_CANDIDATES = [
    {"BLOCK": block, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
    for block in (1, 2, 4, 8)
    for k in (512, 1024, 2048, 4096)
    for stages in (1, 3)
    for warps in (2, 4, 8)
    if 4 <= block * k // (warps * 128) <= 64
]
DOWN_TABLE = {
    (DEFAULT, 8192): {"BLOCK": 2, "BLOCK_K": 256, "STAGES": 1, "num_warps": 4},
    ("sm_90", 512): {"BLOCK": 4, "BLOCK_K": 256, "STAGES": 1, "num_warps": 8},
    ("sm_90", 1024): {"BLOCK": 2, "BLOCK_K": 256, "STAGES": 1, "num_warps": 8},
    ("sm_90", 8192): {"BLOCK": 4, "BLOCK_K": 128, "STAGES": 2, "num_warps": 4},
}
DOWN_CANDIDATES = [
    {"BLOCK": block, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
    for block in (1, 2, 4)
    for k in (128, 256, 512, 1024, 2048)
    for stages in (1, 2)
    for warps in (2, 4, 8)
    if 4 <= 2 * block * k // (warps * 32) <= 64
]
MOST_AHEAD = tl.constexpr(16384)  # weights of gate, and of up, that a program asks for ahead
DOWN_TABLE_FP32 = {(DEFAULT, 8192): {"BLOCK": 1, "BLOCK_K": 256, "STAGES": 1, "num_warps": 4}}


@triton.jit
def silu_product(gate, up, DTYPE: tl.constexpr):
    """swiglu of two sums with the twin's roundings: both sums, the silu, the product.

    A half type forgives the quotient its last two bits, and a correctly rounded one costs as much
    as a tenth of a large product does.
    """
    gate = gate.to(DTYPE).to(tl.float32)
    if DTYPE.primitive_bitwidth == 32:
        silu = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    else:
        silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return (silu * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _sums(
    x_row,
    gate_rows,
    up_rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gate, up [BLOCK] fp32: rows (pointers [BLOCK, 1]) times x."""
    gate = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x_part = tl.load(x_row + k, mask=k < H, other=0.0).to(tl.float32)
        gate += tl.load(gate_rows + k, mask=k < H, other=0.0).to(tl.float32) * x_part
        up += tl.load(up_rows + k, mask=k < H, other=0.0).to(tl.float32) * x_part
    return tl.sum(gate, 1), tl.sum(up, 1)


@triton.jit(do_not_specialize=["first_expert"])
def _gate_up_kernel(
    x,
    gate_up,
    shared,
    ids,
    hidden,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two that holds H
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, H], gate_up [E, 2 I, H], shared [2 SHARED I, H] -> hidden [T, SHARED + k, I]: one of
    SHARED equal parts of the shared experts, or a choice of a token; BLOCK rows of it.

    The shared experts come first: which they are is known before the router has chosen, and where
    launches overlap their weights are on the way by then.
    """
    entry = tl.program_id(1)
    token, part = entry // (SHARED + TOP_K), entry % (SHARED + TOP_K)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Rows outside are read twice instead of masked; only the store needs a mask.
    read = tl.minimum(row, I - 1)[:, None]
    x_row = x + token * H
    dtype: tl.constexpr = hidden.dtype.element_ty
    gate, up = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if part < SHARED:
        gate_rows = shared + (part * I + read) * H
        up_rows = gate_rows + SHARED * I * H
        if PDL and BLOCK * WIDTH <= MOST_AHEAD:
            k = tl.arange(0, WIDTH)[None, :]
            gate_tile = tl.load(gate_rows + k, mask=k < H, other=0.0)
            up_tile = tl.load(up_rows + k, mask=k < H, other=0.0)
            wait_for_inputs(PDL)
            vector = load_vector(x_row, H, WIDTH)
            gate, up = dot_rows(gate_tile, vector), dot_rows(up_tile, vector)
        else:
            wait_for_inputs(PDL)
            gate, up = _sums(x_row, gate_rows, up_rows, H, BLOCK, BLOCK_K, STAGES)
    else:
        wait_for_inputs(PDL)
        expert = tl.load(ids + token * TOP_K + part - SHARED).to(tl.int64) - first_expert
        if (expert >= 0) & (expert < NUM_EXPERTS):  # else another rank's: nobody reads the zeros
            gate_rows = gate_up + (expert * (2 * I) + read) * H
            gate, up = _sums(x_row, gate_rows, gate_rows + I * H, H, BLOCK, BLOCK_K, STAGES)
    y = silu_product(gate, up, dtype)
    tl.store(hidden + entry.to(tl.int64) * I + row, y, mask=row < I)


@triton.jit(do_not_specialize=["first_expert"])
def _down_kernel(
    hidden,
    down,
    shared,
    weights,
    ids,
    choices,
    out,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two that holds TOP_K + SHARED
    CLEAR: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden [T, SHARED + k, I], down [E, H, I], shared [H, SHARED I], weights, ids [T, k] -> out
    [T, H]: BLOCK of a row. All choices at once, so that their weights come together.

    What the router chose is known while the launch before still runs; where BLOCK_K holds a whole
    row, its experts' weights are on their way by then: see wait_for_inputs(). CLEAR: the launch
    before was norm_moe's, whose programs knew the choices before this one could start, and choices
    [T k] is put back to zero.
    """
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    read = tl.minimum(row, H - 1)[None, :]
    part = tl.arange(0, PARTS)[:, None]
    is_shared = (part >= TOP_K) & (part < TOP_K + SHARED)
    at, mask = token * TOP_K + part, part < TOP_K
    expert = tl.load(ids + at, mask=mask, other=-1, cache_modifier=".cg") - first_expert
    weight = tl.load(weights + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    ours = (part < TOP_K) & (expert >= 0) & (expert < NUM_EXPERTS)
    routed_rows = down + (tl.where(ours, expert, 0).to(tl.int64) * H + read) * I
    shared_rows = shared + read * (SHARED * I) + tl.where(is_shared, part - TOP_K, 0) * I
    rows = tl.where(is_shared, shared_rows, routed_rows)[:, :, None]  # [PARTS, BLOCK, 1]
    inside = (ours | is_shared)[:, :, None]
    place = token * (SHARED + TOP_K) + tl.where(is_shared, part - TOP_K, SHARED + part)
    hidden_rows = hidden + place.to(tl.int64)[:, :, None] * I
    k = tl.arange(0, BLOCK_K)[None, None, :]
    if BLOCK_K >= I:
        tile = tl.load(rows + k, mask=inside & (k < I), other=0.0)
        wait_for_inputs(PDL)
        vector = tl.load(hidden_rows + k, mask=inside & (k < I), other=0.0)
        y = tl.sum(tile.to(tl.float32) * vector.to(tl.float32), 2)  # [PARTS, BLOCK]
    else:
        wait_for_inputs(PDL)
        acc = tl.zeros([PARTS, BLOCK, BLOCK_K], tl.float32)
        for start in tl.range(0, I, BLOCK_K, num_stages=STAGES):
            here = inside & (start + k < I)
            vector = tl.load(hidden_rows + start + k, mask=here, other=0.0).to(tl.float32)
            acc += tl.load(rows + start + k, mask=here, other=0.0).to(tl.float32) * vector
        y = tl.sum(acc, 2)
    if CLEAR:
        nobody_reads = mask & (tl.program_id(0) == 0)
        tl.store(choices + at, tl.zeros([PARTS, 1], tl.int32), mask=nobody_reads)
    dtype = out.dtype.element_ty
    weighted = (y.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    total = tl.sum(tl.where(ours, weighted, 0.0), 0).to(dtype)
    if SHARED > 0:
        more = tl.sum(tl.where(is_shared, y, 0.0), 0).to(dtype)
        total = (total.to(tl.float32) + more.to(tl.float32)).to(dtype)
    tl.store(out + token * H + row, total, mask=row < H)


def moe_experts_few(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """As the twin, all tensors contiguous, with at least one token. The shared experts' width is a
    multiple of a routed one's."""
    (num_tokens, hidden_size), top_k = x.shape, ids.shape[1]
    num_experts, _, width = down.shape
    if shared_gate_up is None or shared_down is None:
        num_shared, shared_gate_up, shared_down = 0, gate_up, down
    else:
        num_shared = shared_down.shape[1] // width
        assert shared_down.shape[1] == num_shared * width
    shape = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "H": hidden_size, "I": width}
    shape["SHARED"] = num_shared
    hidden, out = x.new_empty(num_tokens, num_shared + top_k, width), torch.empty_like(x)
    launch = pick(GATE_UP_TABLE, x.device, hidden_size)
    grid = triton.cdiv(width, launch["BLOCK"]), num_tokens * (top_k + num_shared)
    _gate_up_kernel[grid](
        *(x, gate_up, shared_gate_up, ids, hidden, first_expert),
        WIDTH=triton.next_power_of_2(hidden_size),
        **shape,
        **launch,
        **overlap(x.device),
    )
    add_up_few(hidden, down, shared_down, weights, ids, out, first_expert, num_shared)
    return out


def add_up_few(
    hidden: Tensor,
    down: Tensor,
    shared_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    out: Tensor,
    first_expert: int,
    num_shared: int,
    choices: Tensor | None = None,
) -> None:
    """The second launch: hidden [T, num_shared + k, I] -> out [T, H]; `choices` of norm_moe."""
    num_tokens, hidden_size = out.shape
    top_k, (num_experts, _, width) = ids.shape[1], down.shape
    table = DOWN_TABLE_FP32 if out.dtype == torch.float32 else DOWN_TABLE
    launch = dict(pick(table, out.device, num_tokens * width))
    # Two tokens of narrow experts have the row of one of a wide one, whose lanes they do not fill.
    launch["BLOCK_K"] = min(launch["BLOCK_K"], triton.next_power_of_2(width))
    grid = triton.cdiv(hidden_size, launch["BLOCK"]), num_tokens
    _down_kernel[grid](
        *(hidden, down, shared_down, weights, ids, ids if choices is None else choices),
        *(out, first_expert),
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        SHARED=num_shared,
        PARTS=triton.next_power_of_2(top_k + num_shared),
        CLEAR=choices is not None,
        H=hidden_size,
        I=width,
        **launch,
        **overlap(out.device),
    )
