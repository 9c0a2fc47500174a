"""The experts for many tokens, as products over tokens sorted by expert: see moe.py.

    sort      entries (a token's choices) by expert; a list of tiles, each of one expert
    gate-up   a tile x rows of gate and up -> swiglu, in sorted order
    down      a tile x rows of down -> times the token's weight, back in the entries' order
    sum       the k results of each token, in the order of its choices, and the shared experts'

The shared experts are so many more tiles of the two products, or products of their own: a table
says. The tile list is made on the device, and nothing is counted on the host: grids are upper
bounds fixed by shapes, surplus programs end at once.

With few tokens weights are the left operand: their rows fill the tensor cores' tile however few
tokens an expert has. With many, on Hopper, tokens are, and the copy engine (TMA) brings weights:
one box holds rows of gate and of up, for one product twice as wide. Never synchronises with the
host, and no sum depends on a race.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ernie_engine.kernels.expert_sort import sort_by_expert
from ernie_engine.kernels.launch import DEFAULT, Table, overlap, pick, wait_for_inputs
from ernie_engine.kernels.linear import linear_triton
from ernie_engine.kernels.moe_few import silu_product
from ernie_engine.kernels.products import PAST_L1, add_product, empty_sum, load_columns
from ernie_engine.kernels.swiglu import swiglu_triton

# By tokens. BLOCK_M: entries of a tile, of one size for both products.
TILE_TABLE = {
    (DEFAULT, 64): {"BLOCK_M": 16},
    (DEFAULT, 256): {"BLOCK_M": 32},
    (DEFAULT, 1 << 20): {"BLOCK_M": 64},
    ("sm_90", 32): {"BLOCK_M": 16},
    ("sm_90", 128): {"BLOCK_M": 32},
    ("sm_90", 576): {"BLOCK_M": 64},
    ("sm_90", 1 << 20): {"BLOCK_M": 128},
}
# By BLOCK_M. BLOCK_N: weight rows of a program (of gate and of up each, in the first product).
# TMA: boxes of weights, and of the second product's tokens, come by the copy engine.
GATE_UP_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 64, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "TMA": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 32): {"BLOCK_N": 64, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 5},
    ("sm_90", 64): {"BLOCK_N": 64, "BLOCK_K": 64, "TMA": 1, "num_warps": 4, "num_stages": 4},
    ("sm_90", 128): {"BLOCK_N": 128, "BLOCK_K": 64, "TMA": 1, "num_warps": 8, "num_stages": 4},
}
DOWN_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 128, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "TMA": 0, "num_warps": 4, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_N": 64, "BLOCK_K": 128, "TMA": 0, "num_warps": 4, "num_stages": 4},
    ("sm_90", 64): {"BLOCK_N": 128, "BLOCK_K": 64, "TMA": 0, "num_warps": 4, "num_stages": 4},
    ("sm_90", 128): {"BLOCK_N": 256, "BLOCK_K": 64, "TMA": 1, "num_warps": 8, "num_stages": 4},
}
TILE_CANDIDATES = [{"BLOCK_M": m} for m in (16, 32, 64, 128)]
# For either product. The copy engine is of no use to tiles that wait for memory.
CANDIDATES = [
    {"BLOCK_N": n, "BLOCK_K": k, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for n, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
    for k in (64, 128)
    for stages in (3, 4, 5)
    for tma in (0, 1)
]
# Products of fp32 run without tensor cores: tiles of operands must fit into registers.
TILE_TABLE_FP32 = {(DEFAULT, 1 << 20): {"BLOCK_M": 16}}
TABLE_FP32 = {
    (DEFAULT, 16): {"BLOCK_N": 32, "BLOCK_K": 32, "TMA": 0, "num_warps": 4, "num_stages": 2},
}
# By tokens: 1 = the shared experts in the same launches. With many, products of their own are as
# fast as cuBLAS.
SHARED_TABLE = {
    (DEFAULT, 256): {"TOGETHER": 1},
    (DEFAULT, 257): {"TOGETHER": 0},
}
SHARED_CANDIDATES = [{"TOGETHER": 1}, {"TOGETHER": 0}]
HALVED = tl.constexpr(64)  # a larger tile that is not half full is computed as half a tile
MOST_BLOCK_K = 128  # of the tables; the shared experts' parts are a multiple of it wide
SUM_BLOCK = 1024  # columns of a program of the sum
# More are done one part after the other. What lies between the launches takes k (H + I) numbers a
# token, 805 MB for so many of 21B; without a limit a step of 131072 tokens would take 6.4 GB from
# the K/V cache.
TOKENS_AT_ONCE = 16384


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


@triton.jit
def _across(a, b, TMA: tl.constexpr):
    """a [M] of tokens and b [N] of weights' rows, such that a tile of a product holds both: the
    left operand's come first, tokens with TMA, else weights."""
    across = a[None, :], b[:, None]
    if TMA:
        across = a[:, None], b[None, :]
    return across


@triton.jit
def _gate_up_tile(
    x,
    gate_up,
    shared,
    order,
    hidden,
    num_tokens,
    routed,
    expert,
    first,
    last,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Places first .. last - 1, at most M, times BLOCK_N rows of gate and of up each."""
    place = first + tl.arange(0, M)
    token = tl.load(order + place, mask=routed & (place < last), other=0) // TOP_K
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at, to_row = _across(place.to(tl.int64), row, TMA)
    places = hidden + at * I + to_row
    if TMA:
        tl.static_assert(SHARED == 0)
        both = empty_sum(M, 2 * BLOCK_N, x.dtype.element_ty)
        x_rows = x + token * H
        for start in tl.range(0, H, BLOCK_K):
            x_tile = load_columns(x_rows, place < last, start, H, BLOCK_K)
            box = gate_up.load([2 * expert.to(tl.int32), tl.program_id(0) * BLOCK_N, start])
            both = add_product(x_tile, box.reshape(2 * BLOCK_N, BLOCK_K).T, both)
        gate, up = tl.split(both.reshape(M, 2, BLOCK_N).permute(0, 2, 1))
    else:
        gate_rows = gate_up + (expert * (2 * I) + row) * H
        up_rows = gate_rows + I * H
        if SHARED > 0:
            token = tl.where(routed, token, place)
            shared_rows = shared + (expert * I + row) * H
            gate_rows = tl.where(routed, gate_rows, shared_rows)
            up_rows = tl.where(routed, up_rows, shared_rows + SHARED * I * H)
            behind = hidden + num_tokens.to(tl.int64) * (TOP_K * I) + expert * I
            places = tl.where(routed, places, behind + at * (SHARED * I) + to_row)
        x_rows = x + token * H
        gate = empty_sum(BLOCK_N, M, x.dtype.element_ty)
        up = empty_sum(BLOCK_N, M, x.dtype.element_ty)
        for start in tl.range(0, H, BLOCK_K):
            # Shared experts' may come before the wait: see wait_for_inputs().
            x_tile = tl.trans(load_columns(x_rows, place < last, start, H, BLOCK_K, PAST_L1))
            gate_tile = load_columns(gate_rows, row < I, start, H, BLOCK_K)
            up_tile = load_columns(up_rows, row < I, start, H, BLOCK_K)
            gate = add_product(gate_tile, x_tile, gate)
            up = add_product(up_tile, x_tile, up)
    y = silu_product(gate, up, hidden.dtype.element_ty)
    inside_place, inside_row = _across(place < last, row < I, TMA)
    tl.store(places, y, mask=inside_place & inside_row)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _gate_up_kernel(
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
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, H], gate_up [E, 2 I, H], shared [2 SHARED I, H] -> hidden: [T k, I] in sorted order,
    then [T, SHARED I]. A tile, BLOCK_N rows; the shared experts are done in SHARED parts. With TMA
    gate_up is a descriptor of [2 E, I, H].

    The shared experts' tiles do not wait: the launch before only sorted, and x is of one before it.
    """
    if tl.program_id(1) >= _shared_tiles(num_tokens, SHARED, BLOCK_M):
        wait_for_inputs(PDL)
    routed, expert, first, last = _tile_bounds(bounds, used, num_tiles, num_tokens, SHARED, BLOCK_M)
    if first >= last:
        return
    if BLOCK_M > HALVED and last - first <= BLOCK_M // 2:
        _gate_up_tile(
            *(x, gate_up, shared, order, hidden, num_tokens, routed, expert, first, last),
            *(TOP_K, SHARED, H, I, BLOCK_M // 2, BLOCK_N, BLOCK_K, TMA),
        )
    else:
        _gate_up_tile(
            *(x, gate_up, shared, order, hidden, num_tokens, routed, expert, first, last),
            *(TOP_K, SHARED, H, I, BLOCK_M, BLOCK_N, BLOCK_K, TMA),
        )


@triton.jit
def _down_tile(
    hidden,
    down,
    shared,
    weights,
    order,
    products,
    num_tokens,
    routed,
    expert,
    first,
    last,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Places first .. last - 1, at most M, times BLOCK_N rows of down and the tokens' weights."""
    place = first + tl.arange(0, M)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if TMA:
        tl.static_assert(SHARED == 0)
        acc = empty_sum(M, BLOCK_N, products.dtype.element_ty)
        for start in tl.range(0, I, BLOCK_K):
            hidden_tile = hidden.load([first, start])
            box = down.load([expert.to(tl.int32), tl.program_id(0) * BLOCK_N, start])
            acc = add_product(hidden_tile, box.reshape(BLOCK_N, BLOCK_K).T, acc)
    else:
        hidden_rows = hidden + place.to(tl.int64) * I
        down_rows = down + (expert * H + row) * I
        inner = I
        if SHARED > 0:
            tl.static_assert(I % BLOCK_K == 0, "or columns of the longer sum would be left out")
            behind = hidden + num_tokens.to(tl.int64) * (TOP_K * I)
            hidden_rows = tl.where(routed, hidden_rows, behind + place.to(tl.int64) * (SHARED * I))
            down_rows = tl.where(routed, down_rows, shared + row.to(tl.int64) * (SHARED * I))
            inner = tl.where(routed, I, SHARED * I)
        acc = empty_sum(BLOCK_N, M, hidden.dtype.element_ty)
        for start in tl.range(0, inner, BLOCK_K):
            hidden_tile = tl.trans(load_columns(hidden_rows, place < last, start, I, BLOCK_K))
            down_tile = load_columns(down_rows, row < H, start, I, BLOCK_K)
            acc = add_product(down_tile, hidden_tile, acc)
    mine = routed & (place < last)
    entry = tl.load(order + place, mask=mine, other=0)
    weight = tl.load(weights + entry, mask=mine, other=1.0).to(tl.float32)
    if SHARED > 0:
        entry = tl.where(routed, entry, num_tokens * TOP_K + place)
    at, to_row = _across(entry.to(tl.int64), row, TMA)
    weight, _ = _across(weight, row, TMA)
    y = acc.to(products.dtype.element_ty).to(tl.float32) * weight
    inside_place, inside_row = _across(place < last, row < H, TMA)
    places = products + at * H + to_row
    tl.store(places, y.to(products.dtype.element_ty), mask=inside_place & inside_row)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _down_kernel(
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
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden as _gate_up_kernel leaves it, down [E, H, I], shared [H, SHARED I], weights [T k] ->
    products: [T k, H], not sorted, then [T, H] of the shared experts. With TMA hidden and down are
    descriptors; what a box holds of other experts' places is not stored."""
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = min(SHARED, 1)  # here the shared experts are one, with a longer sum
    routed, expert, first, last = _tile_bounds(bounds, used, num_tiles, num_tokens, PARTS, BLOCK_M)
    if first < last:
        _down_tile(
            *(hidden, down, shared, weights, order, products, num_tokens),
            *(routed, expert, first, last),
            *(TOP_K, SHARED, H, I, BLOCK_M, BLOCK_N, BLOCK_K, TMA),
        )


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


def _launch(table: Table, x: Tensor, block_m: int, parts: int, width: int) -> Mapping[str, int]:
    """The row of a product. The copy engine takes rows of a multiple of 16 bytes, and no parts."""
    row = pick(table, x.device, block_m)
    can = parts == 0 and all(n * x.element_size() % 16 == 0 for n in (x.shape[1], width))
    return {**row, "TMA": int(row["TMA"] and can)}


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
    # Not memory that the sort had and gave back: some of the first product's programs do not wait.
    hidden = x.new_empty(num_tokens * (top_k + parts), width)
    tiles = sort_by_expert(ids, num_experts, first_expert, block_m)
    num_tiles, more_tiles = tiles.bounds.shape[1], triton.cdiv(num_tokens, block_m)
    shape = {"TOP_K": top_k, "SHARED": parts, "H": hidden_size, "I": width, "BLOCK_M": block_m}
    overlapping = overlap(x.device)

    launch = _launch(TABLE_FP32 if wide else GATE_UP_TABLE, x, block_m, parts, width)
    weight = gate_up
    if launch["TMA"]:
        box = [2, launch["BLOCK_N"], launch["BLOCK_K"]]
        weight = TensorDescriptor.from_tensor(gate_up.view(-1, width, hidden_size), box)
    grid = triton.cdiv(width, launch["BLOCK_N"]), num_tiles + parts * more_tiles
    _gate_up_kernel[grid](
        *(x, weight, shared_gate_up, *tiles, hidden, num_tiles, num_tokens),
        **shape,
        **launch,
        **overlapping,
    )

    num_entries = ids.numel()
    products = x.new_empty(num_entries + min(parts, 1) * num_tokens, hidden_size)
    launch = _launch(TABLE_FP32 if wide else DOWN_TABLE, x, block_m, parts, width)
    tokens, weight = hidden, down
    if launch["TMA"]:
        columns = launch["BLOCK_K"]
        tokens = TensorDescriptor.from_tensor(hidden, [block_m, columns])
        weight = TensorDescriptor.from_tensor(down, [1, launch["BLOCK_N"], columns])
    grid = triton.cdiv(hidden_size, launch["BLOCK_N"]), num_tiles + min(parts, 1) * more_tiles
    _down_kernel[grid](
        *(tokens, weight, shared_down, weights, *tiles, products, num_tiles, num_tokens),
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
