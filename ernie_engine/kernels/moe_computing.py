"""The computing warps of moe_hopper.py.

Two groups of four have half of each tile's entries, at a pace of their own: one multiplies while
the other rounds and stores. A group without an entry in a tile passes it over. They never wait for
each other, only for the loading warps.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ernie_engine.kernels.hopper import barrier
from ernie_engine.kernels.moe_loading import BLOCK_K, ROWS, STAGES
from ernie_engine.kernels.moe_units import PLACES, hear, num_columns


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
def _turned(y, staging, LAYOUT: gl.constexpr):
    """y [PLACES, ROWS // 2] in another layout, by way of shared memory."""
    barrier()  # what was there before has been read
    staging.store(y)
    barrier()
    return staging.load(LAYOUT)


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
):
    """A group of computing warps: the first PLACES of each tile (MINE 0) or the others."""
    order, _, _, _, num_tokens = work
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    DTYPE: gl.constexpr = out.dtype.element_ty
    HALF: gl.constexpr = ROWS // 2
    columns = gl.arange(0, HALF, gl.SliceLayout(0, MEMORY))[None, :]
    places = MINE * PLACES + gl.arange(0, PLACES, gl.SliceLayout(1, MEMORY))
    step, turn = 0, 1
    expert, first, last, block = hear(news, 0)
    while block >= 0:
        routed, place, end = expert >= 0, first + places, num_columns(expert, H, I, S, GATE_UP)
        inside = place < last
        if first + MINE * PLACES >= last:
            step = _pass_over(barriers, step, end)
        elif GATE_UP:
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE, GATE_UP)
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
            sums, step = _multiply(a_tiles, b_tiles, barriers, step, end, MINE, GATE_UP)
            halves = gl.split(sums.reshape([PLACES, 2, HALF]).permute([0, 2, 1]))
            for half in gl.static_range(2):
                y = _turned(halves[half].to(DTYPE), staging, MEMORY).to(gl.float32)
                column = block * ROWS + half * HALF + columns
                y = (y * weight[:, None]).to(DTYPE)
                gl.store(rows + column, y, mask=inside[:, None] & (column < H))
        expert, first, last, block = hear(news, turn)
        turn += 1
