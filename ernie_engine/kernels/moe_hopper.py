"""The experts' two products on Hopper, in Gluon: see moe_grouped.py for what they are.

As many programs as multiprocessors. Each takes one unit after the other, a tile of 128 entries by
256 rows of an expert's weights, whichever is next; the shared experts are the first units, as one
more expert of all tokens. Four warps bring operands into shared memory, the copy engine's boxes
and, for the first product, rows of tokens wherever they stand, ahead over the ends of units too.
Two groups of four warps have 64 entries each and a pace of their own: one multiplies while the
other rounds and stores. No result depends on which program takes a unit.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ernie_engine.kernels.expert_sort import Tiles
from ernie_engine.kernels.launch import is_hopper, num_multiprocessors, pick

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6 has the former, 3.7 this
PLACES = gl.constexpr(64)  # of a group of computing warps
BLOCK_M = gl.constexpr(2 * PLACES.value)
ROWS = gl.constexpr(256)  # of weights: half of gate and half of up, or all of down
BLOCK_K = gl.constexpr(64)  # 128 bytes, the span of the copy engine's swizzle
STAGES = gl.constexpr(4)  # steps along K on their way or in use
SLOTS = gl.constexpr(2)  # units told and not yet heard
LOADERS = gl.constexpr(128)  # threads of the loading warps
# Registers a thread: what all begin with; then the loading warps leave some to the computing ones.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
COMPUTING, LOADING = gl.constexpr(216), gl.constexpr(72)

# By entries an expert has on average. AT_ONCE: steps whose copies are asked for together, once all
# their stages are free. Two make 256 bytes of each row of weights, which the memory likes; where
# the tensor cores are the limit, waiting costs more.
TABLE = {("sm_90", 112): {"AT_ONCE": 2}, ("sm_90", 113): {"AT_ONCE": 1}}
CANDIDATES = [{"AT_ONCE": 1}, {"AT_ONCE": 2}]


def takes(x: Tensor, down: Tensor, shared_down: Tensor | None) -> bool:
    """Whether the products are made for x [T, H], down [E, H, I], shared [H, S] and their card."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    widths = [t.shape[-1] for t in (down, shared_down) if t is not None]
    rows = x.shape[1] % BLOCK_K.value == 0 and all(width % 8 == 0 for width in widths)
    return is_hopper(x.device) and halves and rows


@gluon.jit
def _unit(work, unit, BLOCKS: gl.constexpr, SHARED_BLOCKS: gl.constexpr):
    """The expert, or -1 for the shared ones; the first of the tile's places and the one behind the
    last; the block of weights' rows, or -1 behind the last unit."""
    _, bounds, used, num_tiles, num_tokens = work
    number = unit - (num_tokens + BLOCK_M - 1) // BLOCK_M * SHARED_BLOCKS
    routed = number >= 0
    there = routed & (number < gl.load(used) * BLOCKS)
    tile = bounds + number // BLOCKS
    expert = gl.load(tile, mask=there, other=-1)
    first = gl.load(tile + num_tiles, mask=there, other=0)
    last = gl.load(tile + 2 * num_tiles, mask=there, other=0)
    block = gl.where(there, number % BLOCKS, -1)
    if SHARED_BLOCKS > 0:
        begin = unit // SHARED_BLOCKS * BLOCK_M
        first = gl.where(routed, first, begin)
        last = gl.where(routed, last, gl.minimum(begin + BLOCK_M, num_tokens))
        block = gl.where(routed, block, unit % SHARED_BLOCKS)
    return expert, first, last, block


@gluon.jit
def _tell(unit, news, turn):
    """The loading warps say which unit is next, once both groups have heard of the one whose slot
    it takes."""
    expert, first, last, block = unit
    slots, told, heard = news
    slot = turn % SLOTS
    i = gl.arange(0, 4, gl.BlockedLayout([4], [32], [4], [0]))
    numbers = gl.where(i < 2, gl.where(i == 0, expert, first), gl.where(i == 2, last, block))
    mbarrier.wait(heard.index(slot), ((turn // SLOTS) & 1) ^ 1)
    slots.index(slot).store(numbers)
    barrier()
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def _hear(news, turn):
    """What _tell() said."""
    slots, told, heard = news
    slot = turn % SLOTS
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    mbarrier.wait(told.index(slot), (turn // SLOTS) & 1)
    numbers = slots.index(slot).load(LAYOUT)
    mbarrier.arrive(heard.index(slot), count=1)
    i = gl.arange(0, 4, LAYOUT)
    expert, first = gl.sum(gl.where(i == 0, numbers, 0), 0), gl.sum(gl.where(i == 1, numbers, 0), 0)
    last, block = gl.sum(gl.where(i == 2, numbers, 0), 0), gl.sum(gl.where(i == 3, numbers, 0), 0)
    return expert, first, last, block


@gluon.jit
def _rows(x, order, unit, GROUP: gl.constexpr, TOP_K: gl.constexpr, H: gl.constexpr):
    """Of a group's entries: where their tokens' rows begin, and which are real."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    expert, first, last, _ = unit
    place = first + GROUP * PLACES + gl.arange(0, PLACES, gl.SliceLayout(1, LAYOUT))
    entry = gl.load(order + place, mask=(place < last) & (expert >= 0), other=0)
    token = gl.where(expert >= 0, entry // TOP_K, place)
    columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    return x + (token * H)[:, None] + columns[None, :], (place < last)[:, None]


@gluon.jit
def _both_rows(tokens, order, unit, TOP_K: gl.constexpr, H: gl.constexpr, GATE_UP: gl.constexpr):
    """_rows() of both groups. The second product's entries lie sorted, for the copy engine."""
    if GATE_UP:
        return _rows(tokens, order, unit, 0, TOP_K, H) + _rows(tokens, order, unit, 1, TOP_K, H)
    else:
        return (0, 0, 0, 0)


@gluon.jit
def _bring(
    operands,
    tiles,
    barriers,
    unit,
    rows,
    step,
    begin,
    end,
    GATE_UP: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """Columns begin .. end - 1 of a unit's operands, BLOCK_K a step; the next step's number."""
    full, empty = barriers
    a_tiles, boxes = tiles
    tokens, weight, shared_tokens, shared_weight = operands
    near_rows, near_inside, far_rows, far_inside = rows
    expert, first, _, block = unit
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    matrix, row = gl.maximum(expert, 0) * PARTS, block * (ROWS // PARTS)
    for start in range(begin, end, BLOCK_K):
        stage = step % STAGES
        if step % AT_ONCE == 0:
            last = step + AT_ONCE - 1  # stages become free one after the other
            mbarrier.wait(empty.index(last % STAGES), ((last // STAGES) & 1) ^ 1)
        there, box = full.index(stage), boxes.index(stage)
        near, far = a_tiles.index(2 * stage), a_tiles.index(2 * stage + 1)
        BYTES: gl.constexpr = (ROWS if GATE_UP else ROWS + BLOCK_M) * BLOCK_K * 2
        mbarrier.expect(there, BYTES)
        if expert >= 0:
            tma.async_copy_global_to_shared(weight, [matrix, row, start], there, box)
        else:
            tma.async_copy_global_to_shared(shared_weight, [matrix, row, start], there, box)
        if GATE_UP:
            async_copy.async_copy_global_to_shared(near, near_rows + start, mask=near_inside)
            async_copy.async_copy_global_to_shared(far, far_rows + start, mask=far_inside)
            async_copy.mbarrier_arrive(there, increment_count=False)
        elif expert >= 0:
            tma.async_copy_global_to_shared(tokens, [first, start], there, near)
            tma.async_copy_global_to_shared(tokens, [first + PLACES, start], there, far)
        else:
            tma.async_copy_global_to_shared(shared_tokens, [first, start], there, near)
            tma.async_copy_global_to_shared(shared_tokens, [first + PLACES, start], there, far)
        step += 1
    return step


@gluon.jit
def _num_columns(expert, H: gl.constexpr, I: gl.constexpr, S: gl.constexpr, GATE_UP: gl.constexpr):
    """Of a product's operands: what is summed over."""
    if GATE_UP:
        return H
    else:
        return gl.where(expert >= 0, I, S)


@gluon.jit
def _load(
    operands,
    tiles,
    barriers,
    news,
    work,
    TOP_K: gl.constexpr,
    H: gl.constexpr,
    I: gl.constexpr,
    S: gl.constexpr,
    BLOCKS: gl.constexpr,
    SHARED_BLOCKS: gl.constexpr,
    GATE_UP: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """The loading warps. In the middle of a unit, when they would wait for a stage, they take the
    next one, tell it and look up where its tokens stand."""
    order, _, used, _, _ = work
    taken = used + (1 if GATE_UP else 2)
    unit = _unit(work, gl.program_id(0), BLOCKS, SHARED_BLOCKS)
    _tell(unit, news, 0)
    rows = _both_rows(operands[0], order, unit, TOP_K, H, GATE_UP)
    step, turn = 0, 1
    while unit[3] >= 0:
        end = _num_columns(unit[0], H, I, S, GATE_UP)
        middle = end // BLOCK_K // 2 * BLOCK_K
        step = _bring(operands, tiles, barriers, unit, rows, step, 0, middle, GATE_UP, AT_ONCE)
        number = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
        ahead = _unit(work, number, BLOCKS, SHARED_BLOCKS)
        _tell(ahead, news, turn)
        turn += 1
        rows_ahead = _both_rows(operands[0], order, ahead, TOP_K, H, GATE_UP)
        step = _bring(operands, tiles, barriers, unit, rows, step, middle, end, GATE_UP, AT_ONCE)
        unit, rows = ahead, rows_ahead


@gluon.jit
def _multiply(a_tiles, b_tiles, barriers, step, end, MINE: gl.constexpr):
    """A unit's sums [PLACES, ROWS] over `end` columns, and the number of the next step."""
    full, empty = barriers
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums = gl.zeros([PLACES, ROWS], gl.float32, LAYOUT)
    for start in range(0, end, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        a, b = a_tiles.index(2 * stage + MINE), b_tiles.index(stage).permute((1, 0))
        sums = warpgroup_mma(a, b, sums, use_acc=start > 0, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=start > 0)
        step += 1
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return sums, step


@gluon.jit
def _pass_over(barriers, step, end):
    """A unit without an entry for this group; the number of the next step."""
    full, empty = barriers
    for _ in range(0, end, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def _silu_product(gate, up, DTYPE: gl.constexpr):
    """As moe_few.silu_product()."""
    gate = gate.to(DTYPE).to(gl.float32)
    silu = (gate / (1.0 + gl.exp(-gate))).to(DTYPE).to(gl.float32)
    return (silu * up.to(DTYPE).to(gl.float32)).to(DTYPE)


@gluon.jit
def _turned(y, staging, LAYOUT: gl.constexpr):
    """y [PLACES, ROWS // 2] in another layout, by way of shared memory."""
    barrier()  # what was there before has been read
    staging.store(y)
    barrier()
    return staging.load(LAYOUT)


@gluon.jit
def _compute(
    weights,
    out,
    shared_out,
    a_tiles,
    b_tiles,
    staging,
    barriers,
    news,
    work,
    TOP_K: gl.constexpr,
    H: gl.constexpr,
    I: gl.constexpr,
    S: gl.constexpr,
    GATE_UP: gl.constexpr,
    MINE: gl.constexpr,
):
    """A group of computing warps: the first PLACES of each tile (MINE 0) or the others."""
    order, _, _, _, num_tokens = work
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    DTYPE: gl.constexpr = out.dtype.element_ty
    HALF: gl.constexpr = ROWS // 2
    columns = gl.arange(0, HALF, gl.SliceLayout(0, MEMORY))[None, :]
    places = MINE * PLACES + gl.arange(0, PLACES, gl.SliceLayout(1, MEMORY))
    step, turn = 0, 1
    expert, first, last, block = _hear(news, 0)
    while block >= 0:
        routed, place, end = expert >= 0, first + places, _num_columns(expert, H, I, S, GATE_UP)
        inside = place < last
        if first + MINE * PLACES >= last:
            step = _pass_over(barriers, step, end)
        elif GATE_UP:
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE)
            gate, up = gl.split(sums.reshape([PLACES, 2, HALF]).permute([0, 2, 1]))
            y = _turned(_silu_product(gate, up, DTYPE), staging, MEMORY)
            width = gl.where(routed, I, S)
            column = block * HALF + columns
            rows = gl.where(routed, out, shared_out) + place.to(gl.int64)[:, None] * width
            gl.store(rows + column, y, mask=inside[:, None] & (column < width))
        else:
            entry = gl.load(order + place, mask=inside & routed, other=0)
            weight = gl.load(weights + entry, mask=inside & routed, other=1.0).to(gl.float32)
            entry = gl.where(routed, entry, num_tokens * TOP_K + place)
            rows = out + entry.to(gl.int64)[:, None] * H
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE)
            halves = gl.split(sums.reshape([PLACES, 2, HALF]).permute([0, 2, 1]))
            for half in gl.static_range(2):
                y = _turned(halves[half].to(DTYPE), staging, MEMORY).to(gl.float32)
                column = block * ROWS + half * HALF + columns
                y = (y * weight[:, None]).to(DTYPE)
                gl.store(rows + column, y, mask=inside[:, None] & (column < H))
        expert, first, last, block = _hear(news, turn)
        turn += 1


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
            (_compute, (weights, out, shared_out, a_tiles, b_tiles, staging.index(0), barriers,
                        news, work, TOP_K, H, I, S, GATE_UP, 0)),
            (_compute, (weights, out, shared_out, a_tiles, b_tiles, staging.index(1), barriers,
                        news, work, TOP_K, H, I, S, GATE_UP, 1)),
            (_load, (operands, tiles, barriers, news, work, TOP_K, H, I, S, BLOCKS, SHARED_BLOCKS,
                     GATE_UP, AT_ONCE)),
        ],
        [4, 4],
        [COMPUTING, LOADING],
    )
    # fmt: on


def _boxes(tensor: Tensor, *box: int) -> TensorDescriptor:
    """`tensor` for the copy engine."""
    layout = gl.NVMMASharedLayout(128, 16, rank=len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


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
    gate_up = _boxes(gate_up.view(-1, width, hidden_size), 2, rows // 2, columns)
    down = _boxes(down, 1, rows, columns)
    entries = _boxes(hidden, PLACES.value, columns)
    shared_width, shared_hidden, shared_entries = 0, hidden, entries
    shared = gate_up, down
    num_products = num_entries
    if shared_gate_up is not None and shared_down is not None:
        shared_width = shared_down.shape[1]
        shared_hidden = x.new_empty(num_tokens, shared_width)
        shared_entries = _boxes(shared_hidden, PLACES.value, columns)
        shared = (
            _boxes(shared_gate_up.view(2, shared_width, hidden_size), 2, rows // 2, columns),
            _boxes(shared_down[None], 1, rows, columns),
        )
        num_products += num_tokens
    products = x.new_empty(num_products, hidden_size)
    sizes = {"TOP_K": top_k, "H": hidden_size, "I": width, "S": shared_width}
    grid, number = (num_multiprocessors(x.device),), (tiles.bounds.shape[1], num_tokens)
    _grouped_hopper_kernel[grid](
        *(x, gate_up, x, shared[0], weights, hidden, shared_hidden, *tiles, *number),
        **{**sizes, **at_once, **LAUNCH},
        GATE_UP=True,
    )
    _grouped_hopper_kernel[grid](
        *(entries, down, shared_entries, shared[1], weights, products, products, *tiles, *number),
        **{**sizes, **at_once, **LAUNCH},
        GATE_UP=False,
    )
    return products
