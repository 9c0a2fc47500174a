"""The experts for many tokens, as products over tokens sorted by expert: see moe.py.

    sort      entries (a token's choices) by expert; a list of tiles, each of one expert
    gate-up   a tile x rows of gate and up -> swiglu, in sorted order
    down      a tile x rows of down -> times the token's weight, back in the entries' order
    sum       the k results of each token, in the order of its choices, and the shared experts'

The shared experts are so many more tiles of the two products, or products of their own: a table
says. The tile list is made on the device, in places that need no counting on the host: grids are
upper bounds fixed by shapes, surplus programs end at once. Weights are the left operand: their rows
fill the tensor cores' tile however few tokens an expert has. Never synchronises with the host, and
no sum depends on a race.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_engine.kernels.expert_sort import sort_by_expert
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.linear import linear_triton
from ernie_engine.kernels.moe_few import silu_product
from ernie_engine.kernels.products import add_product, empty_sum, load_columns
from ernie_engine.kernels.swiglu import swiglu_triton

# By tokens. BLOCK_M: entries of a tile, of one size for both products.
TILE_TABLE = {
    (DEFAULT, 64): {"BLOCK_M": 16},
    (DEFAULT, 256): {"BLOCK_M": 32},
    (DEFAULT, 1 << 20): {"BLOCK_M": 64},
    ("sm_90", 64): {"BLOCK_M": 16},
    ("sm_90", 256): {"BLOCK_M": 32},
    ("sm_90", 640): {"BLOCK_M": 64},
    ("sm_90", 1 << 20): {"BLOCK_M": 128},
}
# By BLOCK_M. BLOCK_N: weight rows of a program (of gate and of up each, in the first product).
GATE_UP_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    ("sm_90", 64): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5},
    ("sm_90", 128): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
}
DOWN_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 5},
    ("sm_90", 64): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ("sm_90", 128): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
}
TILE_CANDIDATES = [{"BLOCK_M": m} for m in (16, 32, 64, 128)]
# For either product.
CANDIDATES = [
    {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for n, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
    for k in (64, 128)
    for stages in (3, 4, 5)
]
# Products of fp32 run without tensor cores: tiles of operands must fit into registers.
TILE_TABLE_FP32 = {(DEFAULT, 1 << 20): {"BLOCK_M": 16}}
TABLE_FP32 = {
    (DEFAULT, 16): {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
# By tokens: 1 = the shared experts in the same launches. With many, products of their own are as
# fast as cuBLAS.
SHARED_TABLE = {
    (DEFAULT, 256): {"TOGETHER": 1},
    (DEFAULT, 257): {"TOGETHER": 0},
}
SHARED_CANDIDATES = [{"TOGETHER": 1}, {"TOGETHER": 0}]
MOST_BLOCK_K = 128  # of the tables; the shared experts' parts are a multiple of it wide
SUM_BLOCK = 1024  # columns of a program of the sum
# More are done one part after the other. What lies between the launches takes k (H + I) numbers a
# token, 805 MB for so many of 21B; without a limit a step of 131072 tokens would take 6.4 GB from
# the K/V cache.
TOKENS_AT_ONCE = 16384


@triton.jit
def _tile_bounds(bounds, num_tiles, num_tokens, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's expert, and the first and last of its places. Behind the routed experts' tiles
    come those of the shared ones, PARTS for each BLOCK_M tokens: then the expert is the part."""
    tile = tl.program_id(1)
    routed = tile < num_tiles
    expert = tl.load(bounds + tile, mask=routed, other=0)
    first = tl.load(bounds + num_tiles + tile, mask=routed, other=0)
    last = tl.load(bounds + 2 * num_tiles + tile, mask=routed, other=0)
    if PARTS > 0:
        begin = (tile - num_tiles) // PARTS * BLOCK_M
        expert = tl.where(routed, expert, (tile - num_tiles) % PARTS)
        first = tl.where(routed, first, begin)
        last = tl.where(routed, last, tl.minimum(begin + BLOCK_M, num_tokens))
    return routed, expert.to(tl.int64), first, last


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _gate_up_kernel(
    x,
    gate_up,
    shared,
    order,
    bounds,
    hidden,
    num_tiles,
    num_tokens,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, H], gate_up [E, 2 I, H], shared [2 SHARED I, H] -> hidden: [T k, I] in sorted order,
    then [T, SHARED I]. A tile, BLOCK_N rows; the shared experts are done in SHARED parts."""
    wait_for_inputs(PDL)
    routed, expert, first, last = _tile_bounds(bounds, num_tiles, num_tokens, SHARED, BLOCK_M)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    token = tl.load(order + place, mask=routed & (place < last), other=0) // TOP_K
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_rows = gate_up + (expert * (2 * I) + row) * H
    up_rows = gate_rows + I * H
    places = hidden + place.to(tl.int64)[None, :] * I + row[:, None]
    if SHARED > 0:
        token = tl.where(routed, token, place)
        shared_rows = shared + (expert * I + row) * H
        gate_rows = tl.where(routed, gate_rows, shared_rows)
        up_rows = tl.where(routed, up_rows, shared_rows + SHARED * I * H)
        behind = hidden + num_tokens.to(tl.int64) * (TOP_K * I) + expert * I
        behind += place.to(tl.int64)[None, :] * (SHARED * I) + row[:, None]
        places = tl.where(routed, places, behind)
    x_rows = x + token * H
    gate = empty_sum(BLOCK_N, BLOCK_M, x.dtype.element_ty)
    up = empty_sum(BLOCK_N, BLOCK_M, x.dtype.element_ty)
    for start in tl.range(0, H, BLOCK_K):
        x_tile = tl.trans(load_columns(x_rows, place < last, start, H, BLOCK_K))
        gate_tile = load_columns(gate_rows, row < I, start, H, BLOCK_K)
        up_tile = load_columns(up_rows, row < I, start, H, BLOCK_K)
        gate = add_product(gate_tile, x_tile, gate)
        up = add_product(up_tile, x_tile, up)
    y = silu_product(gate, up, hidden.dtype.element_ty)
    tl.store(places, y, mask=(row < I)[:, None] & (place < last)[None, :])


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _down_kernel(
    hidden,
    down,
    shared,
    weights,
    order,
    bounds,
    products,
    num_tiles,
    num_tokens,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden as _gate_up_kernel leaves it, down [E, H, I], shared [H, SHARED I], weights [T k] ->
    products: [T k, H], not sorted, then [T, H] of the shared experts."""
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = min(SHARED, 1)  # here the shared experts are one, with a longer sum
    routed, expert, first, last = _tile_bounds(bounds, num_tiles, num_tokens, PARTS, BLOCK_M)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden_rows = hidden + place.to(tl.int64) * I
    down_rows = down + (expert * H + row) * I
    inner = I
    if SHARED > 0:
        tl.static_assert(I % BLOCK_K == 0, "or columns of the longer sum would be left out")
        behind = hidden + num_tokens.to(tl.int64) * (TOP_K * I)
        hidden_rows = tl.where(routed, hidden_rows, behind + place.to(tl.int64) * (SHARED * I))
        down_rows = tl.where(routed, down_rows, shared + row.to(tl.int64) * (SHARED * I))
        inner = tl.where(routed, I, SHARED * I)
    acc = empty_sum(BLOCK_N, BLOCK_M, hidden.dtype.element_ty)
    for start in tl.range(0, inner, BLOCK_K):
        hidden_tile = tl.trans(load_columns(hidden_rows, place < last, start, I, BLOCK_K))
        down_tile = load_columns(down_rows, row < H, start, I, BLOCK_K)
        acc = add_product(down_tile, hidden_tile, acc)
    mine = routed & (place < last)
    entry = tl.load(order + place, mask=mine, other=0)
    weight = tl.load(weights + entry, mask=mine, other=1.0).to(tl.float32)
    if SHARED > 0:
        entry = tl.where(routed, entry, num_tokens * TOP_K + place)
    y = acc.to(products.dtype.element_ty).to(tl.float32) * weight[None, :]
    places = products + entry.to(tl.int64)[None, :] * H + row[:, None]
    inside = (row < H)[:, None] & (place < last)[None, :]
    tl.store(places, y.to(products.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_expert"])
def _sum_kernel(
    products,
    ids,
    shared,
    out,
    first_expert,
    HAS_SHARED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """products [T k, H], ids [T, k], shared [T, H] -> out [T, H]: fp32 sums in the order of ids."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        entry = token * TOP_K + choice
        expert = tl.load(ids + entry) - first_expert
        # No product was written for other ranks' experts.
        ours = (expert >= 0) & (expert < NUM_EXPERTS) & (column < H)
        total += tl.load(products + entry * H + column, mask=ours, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if HAS_SHARED:
        more = tl.load(shared + token * H + column, mask=column < H, other=0.0)
        total = (total.to(tl.float32) + more.to(tl.float32)).to(total.dtype)
    tl.store(out + token * H + column, total, mask=column < H)


def moe_experts_grouped(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """As the twin, all tensors contiguous, with at least one token."""
    out = torch.empty_like(x)
    for start in range(0, len(x), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        mine = x[part], weights[part], ids[part], out[part]
        _compute(*mine, gate_up, down, first_expert, shared_gate_up, shared_down)
    return out


def _num_parts(x: Tensor, down: Tensor, shared_down: Tensor | None) -> int:
    """Into how many parts as wide as a routed expert the shared ones are cut; 0: not done here."""
    if shared_down is None or not pick(SHARED_TABLE, x.device, len(x))["TOGETHER"]:
        return 0
    parts, rest = divmod(shared_down.shape[1], down.shape[2])
    return parts if rest == 0 and down.shape[2] % MOST_BLOCK_K == 0 else 0


def _compute(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    out: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
) -> None:
    """As the twin, into `out`."""
    (num_tokens, hidden_size), top_k = x.shape, ids.shape[1]
    num_experts, _, width = down.shape
    parts, shared = _num_parts(x, down, shared_down), None
    if shared_gate_up is not None and shared_down is not None and not parts:
        shared = linear_triton(swiglu_triton(linear_triton(x, shared_gate_up)), shared_down)
    if not parts:
        shared_gate_up, shared_down = gate_up, down  # not looked at
    wide = x.dtype == torch.float32
    block_m = pick(TILE_TABLE_FP32 if wide else TILE_TABLE, x.device, num_tokens)["BLOCK_M"]
    tiles = sort_by_expert(ids, num_experts, first_expert, block_m)
    num_tiles, more_tiles = tiles.bounds.shape[1], triton.cdiv(num_tokens, block_m)
    shape = {"TOP_K": top_k, "SHARED": parts, "H": hidden_size, "I": width, "BLOCK_M": block_m}
    overlapping = overlap(x.device)

    hidden = x.new_empty(num_tokens * (top_k + parts), width)
    launch = pick(TABLE_FP32 if wide else GATE_UP_TABLE, x.device, block_m)
    grid = triton.cdiv(width, launch["BLOCK_N"]), num_tiles + parts * more_tiles
    _gate_up_kernel[grid](
        *(x, gate_up, shared_gate_up, *tiles, hidden, num_tiles, num_tokens),
        **shape,
        **launch,
        **overlapping,
    )

    num_entries = ids.numel()
    products = x.new_empty(num_entries + min(parts, 1) * num_tokens, hidden_size)
    launch = pick(TABLE_FP32 if wide else DOWN_TABLE, x.device, block_m)
    grid = triton.cdiv(hidden_size, launch["BLOCK_N"]), num_tiles + min(parts, 1) * more_tiles
    _down_kernel[grid](
        *(hidden, down, shared_down, weights, *tiles, products, num_tiles, num_tokens),
        **shape,
        **launch,
        **overlapping,
    )
    if parts:
        shared = products[num_entries:]

    block = min(SUM_BLOCK, triton.next_power_of_2(hidden_size))
    _sum_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        *(products, ids, out if shared is None else shared, out, first_expert),
        HAS_SHARED=shared is not None,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        H=hidden_size,
        BLOCK=block,
        **overlapping,
    )
