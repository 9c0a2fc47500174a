"""The loading warps of moe_hopper.py.

They bring operands into shared memory: the copy engine's boxes and, for the first product, rows of
tokens wherever they stand. They are as far ahead of the computing warps as there are stages, over
the ends of units too, and never compute.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ernie_engine.kernels.hopper import wait_for_inputs
from ernie_engine.kernels.moe_units import BLOCK_M, PLACES, num_columns, tell, unit_of

ROWS = gl.constexpr(256)  # of weights in a unit: half of gate and half of up, or all of down
BLOCK_K = gl.constexpr(64)  # 128 bytes, the span of the copy engine's swizzle
STAGES = gl.constexpr(4)  # steps along the columns on their way or in use
LOADERS = gl.constexpr(128)  # threads


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
def load_units(
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
    PDL: gl.constexpr,
):
    """The loading warps. In the middle of a unit, when they would wait for a stage, they take the
    next one, tell it and look up where its tokens stand."""
    order, _, used, _, _ = work
    taken = used + (1 if GATE_UP else 2)
    wait_for_inputs(PDL)
    unit = unit_of(work, gl.program_id(0), BLOCKS, SHARED_BLOCKS)
    tell(unit, news, 0)
    rows = _both_rows(operands[0], order, unit, TOP_K, H, GATE_UP)
    step, turn = 0, 1
    while unit[3] >= 0:
        end = num_columns(unit[0], H, I, S, GATE_UP)
        middle = end // BLOCK_K // 2 * BLOCK_K
        step = _bring(operands, tiles, barriers, unit, rows, step, 0, middle, GATE_UP, AT_ONCE)
        number = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
        ahead = unit_of(work, number, BLOCKS, SHARED_BLOCKS)
        tell(ahead, news, turn)
        turn += 1
        rows_ahead = _both_rows(operands[0], order, ahead, TOP_K, H, GATE_UP)
        step = _bring(operands, tiles, barriers, unit, rows, step, middle, end, GATE_UP, AT_ONCE)
        unit, rows = ahead, rows_ahead
