"""The kernels of moe_grouped.py: tiles of sorted tokens times rows of weights, and the sum.

Owns what one program computes. Grids are upper bounds fixed by shapes, surplus programs end at
once. Weights are the left operand: their rows fill the tensor cores' tile however few tokens an
expert has; shared experts are so many more tiles. Never chooses a size: moe_grouped.py launches
them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch gives ints where a kernel has constexprs)

import triton
import triton.language as tl

from ernie_engine.kernels.launch import wait_for_inputs
from ernie_engine.kernels.moe_few import silu_product
from ernie_engine.kernels.products import PAST_L1, add_product, empty_sum, load_columns


@triton.jit
def _shared_tiles(num_tokens, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles the shared experts have: PARTS for each BLOCK_M tokens, before all others."""
    return PARTS * tl.cdiv(num_tokens, BLOCK_M)


@triton.jit
def _tile_bounds(bounds, used, num_tiles, num_tokens, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's expert, the first of its places and the one behind the last. A shared expert's
    tile: places are tokens, the expert is the part."""
    shared_tiles = _shared_tiles(num_tokens, PARTS, BLOCK_M)
    routed = tl.program_id(1) >= shared_tiles
    tile = tl.program_id(1) - shared_tiles
    inside = routed & (tile < tl.load(used, mask=routed, other=0))
    expert = tl.load(bounds + tile, mask=inside, other=0)
    first = tl.load(bounds + num_tiles + tile, mask=inside, other=0)
    last = tl.load(bounds + 2 * num_tiles + tile, mask=inside, other=0)
    if PARTS > 0:
        begin = tl.program_id(1) // PARTS * BLOCK_M
        expert = tl.where(routed, expert, tl.program_id(1) % PARTS)
        first = tl.where(routed, first, begin)
        last = tl.where(routed, last, tl.minimum(begin + BLOCK_M, num_tokens))
    return routed, expert.to(tl.int64), first, last


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def gate_up_kernel(
    x,
    gate_up,
    shared,
    order,
    bounds,
    used,
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
    then [T, SHARED I]. A tile, BLOCK_N rows of gate and of up each; the shared experts are done in
    SHARED parts.

    The shared experts' tiles do not wait: the launch before only sorted, and x is of one before it.
    """
    if tl.program_id(1) >= _shared_tiles(num_tokens, SHARED, BLOCK_M):
        wait_for_inputs(PDL)
    routed, expert, first, last = _tile_bounds(bounds, used, num_tiles, num_tokens, SHARED, BLOCK_M)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    token = tl.load(order + place, mask=routed & (place < last), other=0) // TOP_K
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = hidden + place.to(tl.int64)[None, :] * I + row[:, None]
    gate_rows = gate_up + (expert * (2 * I) + row) * H
    up_rows = gate_rows + I * H
    if SHARED > 0:
        token = tl.where(routed, token, place)
        shared_rows = shared + (expert * I + row) * H
        gate_rows = tl.where(routed, gate_rows, shared_rows)
        up_rows = tl.where(routed, up_rows, shared_rows + SHARED * I * H)
        behind = hidden + num_tokens.to(tl.int64) * (TOP_K * I) + expert * I
        shared_places = behind + place.to(tl.int64)[None, :] * (SHARED * I) + row[:, None]
        places = tl.where(routed, places, shared_places)
    x_rows = x + token * H
    gate = empty_sum(BLOCK_N, BLOCK_M, x.dtype.element_ty)
    up = empty_sum(BLOCK_N, BLOCK_M, x.dtype.element_ty)
    for start in tl.range(0, H, BLOCK_K):
        # Shared experts' may come before the wait: see wait_for_inputs().
        x_tile = tl.trans(load_columns(x_rows, place < last, start, H, BLOCK_K, PAST_L1))
        gate_tile = load_columns(gate_rows, row < I, start, H, BLOCK_K)
        up_tile = load_columns(up_rows, row < I, start, H, BLOCK_K)
        gate = add_product(gate_tile, x_tile, gate)
        up = add_product(up_tile, x_tile, up)
    y = silu_product(gate, up, hidden.dtype.element_ty)
    tl.store(places, y, mask=(place < last)[None, :] & (row < I)[:, None])


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def down_kernel(
    hidden,
    down,
    shared,
    weights,
    order,
    bounds,
    used,
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
    """hidden as gate_up_kernel leaves it, down [E, H, I], shared [H, SHARED I], weights [T k] ->
    products: [T k, H], not sorted, then [T, H] of the shared experts. A tile, BLOCK_N rows, times
    the tokens' weights."""
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = min(SHARED, 1)  # here the shared experts are one, with a longer sum
    routed, expert, first, last = _tile_bounds(bounds, used, num_tiles, num_tokens, PARTS, BLOCK_M)
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
    inside = (place < last)[None, :] & (row < H)[:, None]
    tl.store(places, y.to(products.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_expert"])
def sum_kernel(
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
