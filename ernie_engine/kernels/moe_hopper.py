"""The experts' two products on Hopper, in Gluon: see moe_grouped.py for what they are.

As many programs as multiprocessors, each with one unit (moe_units.py) after the other, whichever is
next: four warps load (moe_loading.py), two groups of four compute (moe_computing.py). Owns the
launch and its table. No result depends on which program takes a unit.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ernie_engine.kernels.expert_sort import Tiles
from ernie_engine.kernels.hopper import boxes_of
from ernie_engine.kernels.launch import is_hopper, num_multiprocessors, overlap, pick
from ernie_engine.kernels.moe_computing import compute_units
from ernie_engine.kernels.moe_loading import BLOCK_K, LOADERS, ROWS, STAGES, load_units
from ernie_engine.kernels.moe_units import PLACES, SLOTS

# Registers a thread: what all begin with; then the loading warps leave some to the computing ones.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
COMPUTING, LOADING = gl.constexpr(216), gl.constexpr(72)

# By entries to an expert (with expert parallelism other ranks' count too). AT_ONCE: steps whose
# copies are asked for together, once all their stages are free. Two make 256 bytes of each row of
# weights, which the memory likes; where most tiles are full tensor cores are the limit, and waiting
# costs more.
TABLE = {("sm_90", 112): {"AT_ONCE": 2}, ("sm_90", 113): {"AT_ONCE": 1}}
CANDIDATES = [{"AT_ONCE": 1}, {"AT_ONCE": 2}]


def takes(x: Tensor, down: Tensor, shared_down: Tensor | None) -> bool:
    """Whether the products are made for x [T, H], down [E, H, I], shared [H, S] and their card."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    widths = [t.shape[-1] for t in (down, shared_down) if t is not None]
    rows = x.shape[1] % BLOCK_K.value == 0 and all(width % 8 == 0 for width in widths)
    return is_hopper(x.device) and halves and rows


# What differs from step to step makes no kernel of its own.
@gluon.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _grouped_hopper_kernel(
    tokens,
    weight,
    shared_tokens,
    shared_weight,
    weights,
    out,
    shared_out,
    order,
    bounds,
    used,
    num_tiles,
    num_tokens,
    TOP_K: gl.constexpr,
    H: gl.constexpr,
    I: gl.constexpr,
    S: gl.constexpr,
    GATE_UP: gl.constexpr,
    AT_ONCE: gl.constexpr,
    PDL: gl.constexpr,
):
    """GATE_UP: tokens [T, H], weights as descriptors of [2 E, I, H] and [2, S, H] -> out [T k, I]
    in sorted order, shared_out [T, S]. Else descriptors of these two, of [E, H, I] and [1, H, S],
    and weights [T k] -> out [T k + T, H]: of entries, not sorted, then of the shared experts.
    S 0: there are none."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DTYPE: gl.constexpr = out.dtype.element_ty
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCKS: gl.constexpr = ((2 * I if GATE_UP else H) + ROWS - 1) // ROWS
    ALL_BLOCKS: gl.constexpr = ((2 * S if GATE_UP else H) + ROWS - 1) // ROWS
    SHARED_BLOCKS: gl.constexpr = ALL_BLOCKS if S > 0 else 0
    a_tiles = gl.allocate_shared_memory(DTYPE, [2 * STAGES, PLACES, BLOCK_K], TILE)
    b_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, BLOCK_K], TILE)
    boxes = b_tiles._reinterpret(DTYPE, [STAGES, PARTS, ROWS // PARTS, BLOCK_K], BOX)
    staging = gl.allocate_shared_memory(DTYPE, [2, PLACES, ROWS // 2], TILE)
    slots = gl.allocate_shared_memory(gl.int32, [SLOTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + LOADERS if GATE_UP else 1)
        mbarrier.init(empty.index(i), count=2)
    heard = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(SLOTS):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    fence_async_shared()
    barriers, tiles, news = (full, empty), (a_tiles, boxes), (slots, told, heard)
    work = (order, bounds, used, num_tiles, num_tokens)
    operands = (tokens, weight, shared_tokens, shared_weight)
    # fmt: off
    gl.warp_specialize(
        [
            (compute_units, (weights, out, shared_out, a_tiles, b_tiles, staging.index(0), barriers,
                             news, work, TOP_K, H, I, S, GATE_UP, 0, PDL)),
            (compute_units, (weights, out, shared_out, a_tiles, b_tiles, staging.index(1), barriers,
                             news, work, TOP_K, H, I, S, GATE_UP, 1, PDL)),
            (load_units, (operands, tiles, barriers, news, work, TOP_K, H, I, S, BLOCKS,
                          SHARED_BLOCKS, GATE_UP, AT_ONCE, PDL)),
        ],
        [4, 4],
        [COMPUTING, LOADING],
    )
    # fmt: on


def products_hopper(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    weights: Tensor,
    tiles: Tiles,
) -> Tensor:
    """x [T, H], gate_up [E, 2 I, H], down [E, H, I], of the shared experts [2 S, H] and [H, S],
    weights [T, k], tiles of BLOCK_M places, used once -> [T k, H], each entry's result times its
    weight, and [T, H] behind it if there are shared experts."""
    (num_tokens, hidden_size), (num_experts, _, width) = x.shape, down.shape
    num_entries, top_k = weights.numel(), weights.shape[1]
    at_once = pick(TABLE, x.device, num_entries // num_experts)
    rows, columns = ROWS.value, BLOCK_K.value
    hidden = x.new_empty(num_entries, width)
    gate_up = boxes_of(gate_up.view(-1, width, hidden_size), 2, rows // 2, columns)
    down = boxes_of(down, 1, rows, columns)
    entries = boxes_of(hidden, PLACES.value, columns)
    shared_width, shared_hidden, shared_entries = 0, hidden, entries
    shared = gate_up, down
    num_products = num_entries
    if shared_gate_up is not None and shared_down is not None:
        shared_width = shared_down.shape[1]
        shared_hidden = x.new_empty(num_tokens, shared_width)
        shared_entries = boxes_of(shared_hidden, PLACES.value, columns)
        shared = (
            boxes_of(shared_gate_up.view(2, shared_width, hidden_size), 2, rows // 2, columns),
            boxes_of(shared_down[None], 1, rows, columns),
        )
        num_products += num_tokens
    products = x.new_empty(num_products, hidden_size)
    sizes = {"TOP_K": top_k, "H": hidden_size, "I": width, "S": shared_width}
    options = {**sizes, **at_once, **LAUNCH, **overlap(x.device)}
    grid, number = (num_multiprocessors(x.device),), (tiles.bounds.shape[1], num_tokens)
    _grouped_hopper_kernel[grid](
        *(x, gate_up, x, shared[0], weights, hidden, shared_hidden, *tiles, *number),
        **options,
        GATE_UP=True,
    )
    _grouped_hopper_kernel[grid](
        *(entries, down, shared_entries, shared[1], weights, products, products, *tiles, *number),
        **options,
        GATE_UP=False,
    )
    return products
