"""A layer's experts for a token or two, from the residual to their sum, in two launches.

    h = residual + x;  y = norm(h);  weights, ids = router(y);  out = experts(y, weights, ids)

Each rounding is that of the parts: norm_router, moe_experts. Their composition is the twin, and
what runs for more tokens. The first launch has three kinds of programs, in this order: some norm
and multiply with the router's rows, and the last of them chooses; the shared experts' norm for
themselves and need no choice; the routed experts' wait for theirs. So the choice is made while
the memory is busy with the shared experts. The second launch is moe_few's.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it has no parameter for)

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ernie_engine.kernels.gemv import (
    MOST_HIDDEN,
    dot_rows,
    load_rows,
    load_vector,
    normed_vector,
)
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.moe import moe_experts_torch, moe_experts_triton
from ernie_engine.kernels.moe_few import add_up_few, silu_product
from ernie_engine.kernels.norm_router import norm_router_torch, norm_router_triton
from ernie_engine.kernels.router import choose
from ernie_engine.kernels.tickets import is_last, tickets

# By tokens x hidden size. EXPERTS_OF: rows of the router of a program; BLOCK: rows of gate and of
# up each.
TABLE = {
    (DEFAULT, 4096): {"EXPERTS_OF": 1, "BLOCK": 2, "num_warps": 4},
    (DEFAULT, 8192): {"EXPERTS_OF": 1, "BLOCK": 1, "num_warps": 4},
    ("sm_90", 4096): {"EXPERTS_OF": 1, "BLOCK": 2, "num_warps": 4},
    ("sm_90", 6144): {"EXPERTS_OF": 1, "BLOCK": 2, "num_warps": 2},
    ("sm_90", 8192): {"EXPERTS_OF": 1, "BLOCK": 2, "num_warps": 8},
}
CANDIDATES = [
    {"EXPERTS_OF": experts, "BLOCK": block, "num_warps": warps}
    for experts in (1, 2)
    for block, warps in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8))
]
# By tokens: 1 = in two launches; 0: by parts.
FEW = {
    (DEFAULT, 1): {"FEW": 1},
    (DEFAULT, 2): {"FEW": 0},
    ("sm_90", 2): {"FEW": 1},
    ("sm_90", 3): {"FEW": 0},
}
FEW_CANDIDATES = [{"FEW": 1}, {"FEW": 0}]
MOST_POLLS = tl.constexpr(1 << 22)  # seconds; then a result is NaN, or an error would hang the card


@dataclass(frozen=True)
class Parts:
    """What the fusion is made of."""

    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    moe_experts: Callable[..., Tensor]


@triton.jit
def _route(
    x,
    residual,
    norm,
    router,
    bias,
    total,
    normed,
    logits,
    weights,
    ids,
    choices,
    counters,
    token,
    first,
    eps,
    norm_min,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS_OF: tl.constexpr,
    PDL: tl.constexpr,
):
    """The logits of the experts `first`, ...; the last program of a token chooses."""
    expert = first + tl.arange(0, EXPERTS_OF)
    rows = load_rows(router, expert, NUM_EXPERTS, H, WIDTH)
    norm_weight = load_vector(norm, H, WIDTH)
    wait_for_inputs(PDL)
    k, at = tl.arange(0, WIDTH)[None, :], token * H
    is_first = first == 0
    y = normed_vector(
        *(x + at, residual + at, norm_weight, total + at, eps, is_first, True, H, WIDTH)
    )
    tl.store(normed + at + k, y, mask=(k < H) & is_first)
    to = logits + token * NUM_EXPERTS + expert
    tl.store(to, dot_rows(rows, y), mask=expert < NUM_EXPERTS)
    if is_last(counters + token, tl.cdiv(NUM_EXPERTS, EXPERTS_OF)):
        choose(
            *(logits, bias, weights, ids, token, token + 1, NUM_EXPERTS, norm_min),
            *(TOP_K, EXPERTS, 1, 1),
        )
        # What was stored can be read by whoever sees a choice.
        tl.debug_barrier()
        choice = tl.arange(0, CHOICES)
        mine = ids + token * TOP_K + choice
        chosen = tl.load(mine, mask=choice < TOP_K, other=0, cache_modifier=".cg").to(tl.int32)
        seen = choices + token * TOP_K + choice
        tl.atomic_xchg(seen, chosen + 1, mask=choice < TOP_K, sem="release")


@triton.jit
def _await(choice):
    """The expert that stands at `choice` once it was chosen; -1 if nobody chooses."""
    found = tl.load(choice, volatile=True)
    polls = 0
    while (found == 0) & (polls < MOST_POLLS):
        found = tl.load(choice, volatile=True)
        polls += 1
    return found - 1


@triton.jit
def _load_both(gate_rows, H: tl.constexpr, WIDTH: tl.constexpr, UP: tl.constexpr):
    """Rows of gate (pointers [BLOCK, 1]) and, UP numbers behind, of up: [BLOCK, WIDTH] each."""
    k = tl.arange(0, WIDTH)[None, :]
    gate = tl.load(gate_rows + k, mask=k < H, other=0.0)
    return gate, tl.load(gate_rows + UP + k, mask=k < H, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "first_expert"])
def _norm_gate_up_kernel(
    x,
    residual,
    norm,
    router,
    bias,
    gate_up,
    shared,
    total,
    normed,
    logits,
    weights,
    ids,
    choices,
    counters,
    hidden,
    eps,
    norm_min,
    num_tokens,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    LOCAL_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two that holds all experts
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,  # one that holds all choices
    SHARED: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    WIDTH: tl.constexpr,  # one that holds H
    EXPERTS_OF: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x, residual [T, H] -> total, normed [T, H], weights, ids [T, k]; hidden [T, SHARED + k, I]
    as moe_few's first launch leaves it; choices [T k], zero before, holds id + 1 after.

    Programs that nobody waits for come last: those that are waited for have started before.
    """
    pid = tl.program_id(0)
    ROUTING: tl.constexpr = tl.cdiv(NUM_EXPERTS, EXPERTS_OF)
    BLOCKS: tl.constexpr = tl.cdiv(I, BLOCK)
    routing = num_tokens * ROUTING
    if pid < routing:
        _route(
            *(x, residual, norm, router, bias, total, normed, logits, weights, ids),
            *(choices, counters, pid // ROUTING, pid % ROUTING * EXPERTS_OF, eps, norm_min),
            *(NUM_EXPERTS, EXPERTS, TOP_K, CHOICES, H, WIDTH, EXPERTS_OF, PDL),
        )
        return
    row = (pid - routing) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    # Rows outside are read twice instead of masked; only the store needs a mask.
    read = tl.minimum(row, I - 1)[:, None]
    entry = (pid - routing) // BLOCKS
    dtype: tl.constexpr = hidden.dtype.element_ty
    if entry < num_tokens * SHARED:
        token, part = entry // SHARED, entry % SHARED
        gate_tile, up_tile = _load_both(shared + (part * I + read) * H, H, WIDTH, SHARED * I * H)
        norm_weight = load_vector(norm, H, WIDTH)
        wait_for_inputs(PDL)
        at = token * H
        y = normed_vector(
            *(x + at, residual + at, norm_weight, total + at, eps, False, True, H, WIDTH)
        )
        place = token * (SHARED + TOP_K) + part
        value = silu_product(dot_rows(gate_tile, y), dot_rows(up_tile, y), dtype)
    else:
        entry -= num_tokens * SHARED
        token = entry // TOP_K
        place = token * (SHARED + TOP_K) + SHARED + entry % TOP_K
        if PDL:
            gdc_wait()
        expert = _await(choices + entry)
        if PDL:  # the next launch may read what was chosen: all of this one's programs know it
            gdc_launch_dependents()
        local = expert - first_expert
        value = tl.full([BLOCK], float("nan"), dtype)
        if (expert >= 0) & (local >= 0) & (local < LOCAL_EXPERTS):  # another rank's: not read
            rows = gate_up + (local.to(tl.int64) * (2 * I) + read) * H
            gate_tile, up_tile = _load_both(rows, H, WIDTH, I * H)
            k = tl.arange(0, WIDTH)[None, :]
            y = tl.load(normed + token * H + k, mask=k < H, other=0.0, cache_modifier=".cg")
            value = silu_product(dot_rows(gate_tile, y), dot_rows(up_tile, y), dtype)
    tl.store(hidden + place.to(tl.int64) * I + row, value, mask=row < I)


class Begun(NamedTuple):
    """What the first launch leaves."""

    hidden: Tensor  # [T, shared + k, I]
    total: Tensor  # [T, H]
    normed: Tensor  # [T, H]
    weights: Tensor  # [T, k]
    ids: Tensor  # [T, k] int64
    choices: Tensor  # what the second launch puts back to zero


def norm_gate_up(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    gate_up: Tensor,
    first_expert: int,
    shared: Tensor | None,
) -> Begun:
    """The first launch. All tensors contiguous, with at least one token."""
    (num_tokens, hidden_size), num_experts = x.shape, len(router)
    local_experts, width = len(gate_up), gate_up.shape[1] // 2
    tensors = x, residual, norm, router, bias, gate_up
    assert all(t.is_contiguous() for t in tensors) and num_tokens > 0
    assert router.dtype == bias.dtype == torch.float32 and hidden_size <= MOST_HIDDEN
    num_shared = 0
    if shared is not None:
        num_shared, rest = divmod(len(shared) // 2, width)
        assert shared.is_contiguous() and rest == 0
    begun = Begun(
        x.new_empty(num_tokens, num_shared + top_k, width),
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(num_tokens, top_k),
        torch.empty(num_tokens, top_k, dtype=torch.int64, device=x.device),
        tickets("norm_moe.choices", x.device),
    )
    assert num_tokens * top_k <= len(begun.choices)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    launch = pick(TABLE, x.device, num_tokens * hidden_size)
    programs = triton.cdiv(num_experts, launch["EXPERTS_OF"])
    programs += triton.cdiv(width, launch["BLOCK"]) * (num_shared + top_k)
    _norm_gate_up_kernel[(num_tokens * programs,)](
        *(x, residual, norm, router, bias, gate_up, gate_up if shared is None else shared),
        *(begun.total, begun.normed, logits, begun.weights, begun.ids),
        *(begun.choices, tickets("norm_moe", x.device), begun.hidden),
        *(eps, norm_min, num_tokens, first_expert),
        NUM_EXPERTS=num_experts,
        LOCAL_EXPERTS=local_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=top_k,
        CHOICES=triton.next_power_of_2(top_k),
        SHARED=num_shared,
        H=hidden_size,
        I=width,
        WIDTH=triton.next_power_of_2(hidden_size),
        **launch,
        **overlap(x.device),
    )
    return begun


def norm_moe_few(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As composed(), in two launches; all tensors contiguous, with at least one token. The shared
    experts' width is a multiple of a routed one's."""
    route = x, residual, norm, eps, router, bias, top_k, norm_min
    hidden, total, _, weights, ids, choices = norm_gate_up(
        *route, gate_up, first_expert, shared_gate_up
    )
    num_shared = hidden.shape[1] - top_k
    shared = down if shared_down is None else shared_down  # with none not looked at
    out = torch.empty_like(x)
    add_up_few(hidden, down, shared, weights, ids, out, first_expert, num_shared, choices)
    return out, total


def composed(
    parts: Parts,
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    *experts: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], norm [H], router [E, H] and bias [E] fp32, `experts`: gate_up, down,
    first_expert and the shared ones as moe_experts takes them -> out [T, H], residual + x [T, H].
    """
    y, total, weights, ids = parts.norm_router(
        x, residual, norm, eps, router, bias, top_k, norm_min
    )
    gate_up, down, *rest = experts
    return parts.moe_experts(y, gate_up, down, weights, ids, *rest), total


TORCH = Parts(norm_router_torch, moe_experts_torch)
TRITON = Parts(norm_router_triton, moe_experts_triton)


def norm_moe_triton(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the twin, all tensors contiguous."""
    route = x, residual, norm, eps, router, bias, top_k, norm_min
    experts = gate_up, down, first_expert, shared_gate_up, shared_down
    width = 0 if shared_down is None else shared_down.shape[1]
    fits = width % down.shape[2] == 0 and x.shape[1] <= MOST_HIDDEN
    if fits and len(x) and pick(FEW, x.device, len(x))["FEW"]:
        return norm_moe_few(*route, *experts)
    return composed(TRITON, *route, *experts)


def norm_moe_torch(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    norm_min: float,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int = 0,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As composed(), of the twins."""
    route = x, residual, norm, eps, router, bias, top_k, norm_min
    return composed(TORCH, *route, gate_up, down, first_expert, shared_gate_up, shared_down)


IMPLEMENTATIONS = {"norm_moe": {"triton": norm_moe_triton, "torch": norm_moe_torch}}
