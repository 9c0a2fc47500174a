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

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ernie_engine.kernels.expert_sort import Tiles, sort_by_expert
from ernie_engine.kernels.launch import DEFAULT, Table, overlap, pick
from ernie_engine.kernels.linear import linear_triton
from ernie_engine.kernels.moe_tiles import down_kernel, gate_up_kernel, sum_kernel
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
MOST_BLOCK_K = 128  # of the tables; the shared experts' parts are a multiple of it wide
SUM_BLOCK = 1024  # columns of a program of the sum
# More are done one part after the other. What lies between the launches takes k (H + I) numbers a
# token, 805 MB for so many of 21B; without a limit a step of 131072 tokens would take 6.4 GB from
# the K/V cache.
TOKENS_AT_ONCE = 16384


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
    (num_experts, _, width), top_k = down.shape, ids.shape[1]
    parts, shared = _num_parts(x, down, shared_down), None
    if shared_gate_up is not None and shared_down is not None and not parts:
        shared = linear_triton(swiglu_triton(linear_triton(x, shared_gate_up)), shared_down)
    if not parts:
        shared_gate_up, shared_down = gate_up, down  # not looked at
    table = TILE_TABLE_FP32 if x.dtype == torch.float32 else TILE_TABLE
    block_m = pick(table, x.device, len(x))["BLOCK_M"]
    # Not memory that the sort had and gave back: some of the first product's programs do not wait.
    hidden = x.new_empty(len(x) * (top_k + parts), width)
    tiles = sort_by_expert(ids, num_experts, first_expert, block_m)
    shape = {"TOP_K": top_k, "SHARED": parts, "H": x.shape[1], "I": width, "BLOCK_M": block_m}
    _gate_up(x, gate_up, shared_gate_up, tiles, hidden, shape)
    products = x.new_empty(ids.numel() + min(parts, 1) * len(x), x.shape[1])
    _down(x, hidden, down, shared_down, weights, tiles, products, shape)
    if parts:
        shared = products[ids.numel() :]
    _sum(products, ids, shared, out, first_expert, num_experts)


def _grid(
    num_rows: int, launch: Mapping[str, int], tiles: Tiles, parts: int, x: Tensor, block_m: int
) -> tuple[int, int]:
    """Blocks of a weight's rows; as many tiles as there may be, `parts` for each BLOCK_M tokens."""
    num_tiles = tiles.bounds.shape[1] + parts * triton.cdiv(len(x), block_m)
    return triton.cdiv(num_rows, launch["BLOCK_N"]), num_tiles


def _gate_up(
    x: Tensor, gate_up: Tensor, shared: Tensor, tiles: Tiles, hidden: Tensor, shape: dict[str, int]
) -> None:
    block_m, parts, width = shape["BLOCK_M"], shape["SHARED"], shape["I"]
    table = TABLE_FP32 if x.dtype == torch.float32 else GATE_UP_TABLE
    launch, weight = _launch(table, x, block_m, parts, width), gate_up
    if launch["TMA"]:
        box = [2, launch["BLOCK_N"], launch["BLOCK_K"]]
        weight = TensorDescriptor.from_tensor(gate_up.view(-1, width, x.shape[1]), box)
    gate_up_kernel[_grid(width, launch, tiles, parts, x, block_m)](
        *(x, weight, shared, *tiles, hidden, tiles.bounds.shape[1], len(x)),
        **shape,
        **launch,
        **overlap(x.device),
    )


def _down(
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    shared: Tensor,
    weights: Tensor,
    tiles: Tiles,
    products: Tensor,
    shape: dict[str, int],
) -> None:
    block_m, parts = shape["BLOCK_M"], shape["SHARED"]
    table = TABLE_FP32 if x.dtype == torch.float32 else DOWN_TABLE
    launch = _launch(table, x, block_m, parts, shape["I"])
    tokens, weight = hidden, down
    if launch["TMA"]:
        columns = launch["BLOCK_K"]
        tokens = TensorDescriptor.from_tensor(hidden, [block_m, columns])
        weight = TensorDescriptor.from_tensor(down, [1, launch["BLOCK_N"], columns])
    down_kernel[_grid(x.shape[1], launch, tiles, min(parts, 1), x, block_m)](
        *(tokens, weight, shared, weights, *tiles, products, tiles.bounds.shape[1], len(x)),
        **shape,
        **launch,
        **overlap(x.device),
    )


def _sum(
    products: Tensor,
    ids: Tensor,
    shared: Tensor | None,
    out: Tensor,
    first_expert: int,
    num_experts: int,
) -> None:
    (num_tokens, hidden_size), top_k = out.shape, ids.shape[1]
    block = min(SUM_BLOCK, triton.next_power_of_2(hidden_size))
    sum_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        *(products, ids, out if shared is None else shared, out, first_expert),
        HAS_SHARED=shared is not None,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        H=hidden_size,
        BLOCK=block,
        **overlap(out.device),
    )
