"""Units of the experts' products on Hopper, in Gluon: which one a program does next.

A unit is a tile of sorted entries by a block of an expert's rows of weights; the shared experts
come first, as one more expert of all tokens. All blocks of a tile, then the next tile of the same
expert: programs that run together read the same entries, and an expert's weights come from memory
once and from the L2 cache for its other tiles. Owns that order and how the loading warps tell
it to the computing ones. Never touches an operand.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (a kernel's arguments, loops and layouts are not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ernie_engine.kernels.hopper import barrier

PLACES = gl.constexpr(64)  # entries of a tile that a group of computing warps has
BLOCK_M = gl.constexpr(2 * PLACES.value)
SLOTS = gl.constexpr(2)  # units told and not yet heard


@gluon.jit
def unit_of(work, unit, BLOCKS: gl.constexpr, SHARED_BLOCKS: gl.constexpr):
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
def num_columns(expert, H: gl.constexpr, I: gl.constexpr, S: gl.constexpr, GATE_UP: gl.constexpr):
    """Of a product's operands: what is summed over."""
    if GATE_UP:
        return H
    else:
        return gl.where(expert >= 0, I, S)


@gluon.jit
def tell(unit, news, turn):
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
def hear(news, turn):
    """What tell() said."""
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
