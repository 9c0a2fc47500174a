"""The computing warps of moe_hopper.py.

Two groups of four have half of each tile's entries, at a pace of their own: one multiplies while
the other rounds and stores. A group without an entry in a tile passes it over. They never wait for
each other, only for the loading warps.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportFunctionMemberAccess=false
# (a kernel's arguments, loops and layouts are not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ernie_engine.kernels.hopper import barrier, wait_for_inputs
from ernie_engine.kernels.moe_loading import BLOCK_K, ROWS, STAGES
from ernie_engine.kernels.moe_units import PLACES, hear, num_columns

MEMORY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # 16 bytes to a thread


@gluon.jit
def _multiply(a_tiles, b_tiles, barriers, step, end, MINE: gl.constexpr, GATE_UP: gl.constexpr):
    """A unit's sums [PLACES, ROWS] over `end` columns, and the number of the next step."""
    full, empty = barriers
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums = gl.zeros([PLACES, ROWS], gl.float32, LAYOUT)
    for start in range(0, end, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATE_UP:  # tokens' rows were not written by the proxy that products read by
            fence_async_shared()
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
def _halves(sums):
    """The left and the right columns of a unit's sums."""
    return gl.split(sums.reshape([PLACES, 2, ROWS // 2]).permute([0, 2, 1]))


@gluon.jit
def _store(y, staging, rows, column, inside, width, weight):
    """y [PLACES, ROWS // 2], times `weight` if there is one, to `rows` (pointers [PLACES]) from
    `column` on: in a layout of whole rows, by way of shared memory."""
    barrier()  # what was there before has been read
    staging.store(y)
    barrier()
    y = staging.load(MEMORY)
    if weight is not None:
        y = (y.to(gl.float32) * weight[:, None]).to(y.dtype)
    columns = column + gl.arange(0, ROWS // 2, gl.SliceLayout(0, MEMORY))[None, :]
    gl.store(rows[:, None] + columns, y, mask=inside[:, None] & (columns < width))


@gluon.jit
def compute_units(
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
    PDL: gl.constexpr,
):
    """A group of computing warps: the first PLACES of each tile (MINE 0) or the others."""
    order, _, _, _, num_tokens = work
    DTYPE: gl.constexpr = out.dtype.element_ty
    places = MINE * PLACES + gl.arange(0, PLACES, gl.SliceLayout(1, MEMORY))
    step, turn = 0, 1
    wait_for_inputs(PDL)
    expert, first, last, block = hear(news, 0)
    while block >= 0:
        routed, place, end = expert >= 0, first + places, num_columns(expert, H, I, S, GATE_UP)
        inside = place < last
        if first + MINE * PLACES >= last:
            step = _pass_over(barriers, step, end)
        elif GATE_UP:
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE, GATE_UP)
            gate, up = _halves(sums)
            y = _silu_product(gate, up, DTYPE)
            width = gl.where(routed, I, S)
            rows = gl.where(routed, out, shared_out) + place.to(gl.int64) * width
            _store(y, staging, rows, block * (ROWS // 2), inside, width, None)
        else:
            entry = gl.load(order + place, mask=inside & routed, other=0)
            weight = gl.load(weights + entry, mask=inside & routed, other=1.0).to(gl.float32)
            entry = gl.where(routed, entry, num_tokens * TOP_K + place)
            rows = out + entry.to(gl.int64) * H
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE, GATE_UP)
            left, right = _halves(sums)
            _store(left.to(DTYPE), staging, rows, block * ROWS, inside, H, weight)
            _store(right.to(DTYPE), staging, rows, block * ROWS + ROWS // 2, inside, H, weight)
        expert, first, last, block = hear(news, turn)
        turn += 1
