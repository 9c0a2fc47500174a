"""The experts for many tokens, as products over tokens sorted by expert: see moe.py.

    sort      entries (a token's choices) by expert; a list of tiles, each of one expert
    gate-up   a tile x rows of gate and up -> swiglu, in sorted order
    down      a tile x rows of down -> times the token's weight, back in the entries' order
    sum       the k results of each token, in the order of its choices, and the shared experts'

Both products are moe_tiles.py's, or on Hopper moe_hopper.py's for all but few tokens. The list of
tiles is made on the device. Never synchronises with the host, and no sum depends on a race.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

import torch
import triton
from torch import Tensor

from ernie_engine.kernels import moe_hopper
from ernie_engine.kernels.expert_sort import sort_by_expert
from ernie_engine.kernels.launch import DEFAULT, overlap, pick
from ernie_engine.kernels.linear import linear_triton
from ernie_engine.kernels.moe_tiles import down_kernel, gate_up_kernel, sum_kernel
from ernie_engine.kernels.moe_units import BLOCK_M
from ernie_engine.kernels.swiglu import swiglu_triton

# By tokens: 1 = the products of moe_hopper.py, where it takes them.
HOPPER = {
    (DEFAULT, 1): {"HOPPER": 0},
    ("sm_90", 128): {"HOPPER": 0},
    ("sm_90", 129): {"HOPPER": 1},
}
HOPPER_CANDIDATES = [{"HOPPER": 0}, {"HOPPER": 1}]
# By tokens. BLOCK_M: entries of a tile, of one size for both products. On sm_90 larger ones are
# only needed for what moe_hopper.py does not take.
TILE_TABLE = {
    (DEFAULT, 64): {"BLOCK_M": 16},
    (DEFAULT, 256): {"BLOCK_M": 32},
    (DEFAULT, 1 << 20): {"BLOCK_M": 64},
    ("sm_90", 32): {"BLOCK_M": 16},
    ("sm_90", 128): {"BLOCK_M": 32},
}
# By BLOCK_M. BLOCK_N: weight rows of a program (of gate and of up each, in the first product).
GATE_UP_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5},
    ("sm_90", 32): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5},
}
DOWN_TABLE = {
    (DEFAULT, 32): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 64): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16): {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    ("sm_90", 32): {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
}
TILE_CANDIDATES = [{"BLOCK_M": m} for m in (16, 32, 64)]
CANDIDATES = [  # for either product
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
    num_experts, shared = len(down), None
    if pick(HOPPER, x.device, len(x))["HOPPER"] and moe_hopper.takes(x, down, shared_down):
        tiles = sort_by_expert(ids, num_experts, first_expert, BLOCK_M.value)
        mlps = gate_up, down, shared_gate_up, shared_down
        products = moe_hopper.products_hopper(x, *mlps, weights, tiles)
    else:
        parts = _num_parts(x, down, shared_down)
        if shared_gate_up is not None and shared_down is not None and not parts:
            shared = linear_triton(swiglu_triton(linear_triton(x, shared_gate_up)), shared_down)
        mine = (shared_gate_up, shared_down) if parts else (gate_up, down)  # else not looked at
        products = _products(x, gate_up, down, *mine, weights, ids, first_expert, parts)
    if len(products) > ids.numel():
        shared = products[ids.numel() :]
    _sum(products, ids, shared, out, first_expert, num_experts)


def _products(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    first_expert: int,
    parts: int,
) -> Tensor:
    """[T k, H], each entry's result times its weight, and [T, H] behind it of the shared experts if
    they are done here, in `parts`."""
    (num_tokens, hidden_size), (num_experts, _, width) = x.shape, down.shape
    single = x.dtype == torch.float32
    block_m = pick(TILE_TABLE_FP32 if single else TILE_TABLE, x.device, num_tokens)["BLOCK_M"]
    # Not memory that the sort had and gave back: some of the first product's programs do not wait.
    hidden = x.new_empty(num_tokens * (ids.shape[1] + parts), width)
    tiles = sort_by_expert(ids, num_experts, first_expert, block_m)
    num_tiles, shared_tiles = tiles.bounds.shape[1], triton.cdiv(num_tokens, block_m)
    shape = {"TOP_K": ids.shape[1], "SHARED": parts, "H": hidden_size, "I": width}
    launch = pick(TABLE_FP32 if single else GATE_UP_TABLE, x.device, block_m)
    blocks = triton.cdiv(width, launch["BLOCK_N"])
    gate_up_kernel[blocks, num_tiles + parts * shared_tiles](
        *(x, gate_up, shared_gate_up, *tiles, hidden, num_tiles, num_tokens),
        **shape,
        **launch,
        **overlap(x.device),
        BLOCK_M=block_m,
    )
    parts = min(parts, 1)
    products = x.new_empty(ids.numel() + parts * num_tokens, hidden_size)
    launch = pick(TABLE_FP32 if single else DOWN_TABLE, x.device, block_m)
    blocks = triton.cdiv(hidden_size, launch["BLOCK_N"])
    down_kernel[blocks, num_tiles + parts * shared_tiles](
        *(hidden, down, shared_down, weights, *tiles, products, num_tiles, num_tokens),
        **shape,
        **launch,
        **overlap(x.device),
        BLOCK_M=block_m,
    )
    return products


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
