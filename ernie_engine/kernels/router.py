"""Choice of experts, in fp32 from the product to the weights.

    p = softmax(x @ weight.T);  ids = the top_k largest of p + bias, best first
    w = p[ids] / max(sum p[ids], norm_min)

The bias only selects. Trained biases stand near +22..+63 and differ by hundredths, so neither
the product, the bias nor p + bias may be rounded below fp32. Even there exact ties occur: they
go to the lower expert id.

The Triton kernels: a product into logits in memory, then the choice, a program for some tokens. The
product's inner dimension is cut where tokens are few, and the choice adds the parts up, in order. A
score is computed once and made a key that no other expert has; keys are what is compared.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ernie_engine.kernels.gemv import dot_rows, load_rows, load_vector
from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.ordering import FIRST_KEY, order_keys
from ernie_engine.kernels.products import add_exact_product, empty_sum, load_columns

# By the number of tokens. INNER 0: a program holds the rows of EXPERTS in registers and takes ROWS
# tokens one after the other. Else products of tiles, COLUMNS of the inner dimension to a program,
# INNER at once.
TABLE = {
    (DEFAULT, 16): {"ROWS": 1, "EXPERTS": 1, "INNER": 0, "COLUMNS": 0, "num_warps": 4},
    (DEFAULT, 1024): {"ROWS": 16, "EXPERTS": 16, "INNER": 64, "COLUMNS": 512, "num_warps": 4},
    (DEFAULT, 16384): {"ROWS": 64, "EXPERTS": 64, "INNER": 32, "COLUMNS": 16384, "num_warps": 8},
    ("sm_90", 16): {"ROWS": 1, "EXPERTS": 1, "INNER": 0, "COLUMNS": 0, "num_warps": 4},
    ("sm_90", 64): {"ROWS": 16, "EXPERTS": 64, "INNER": 128, "COLUMNS": 128, "num_warps": 4},
    ("sm_90", 1024): {"ROWS": 64, "EXPERTS": 64, "INNER": 128, "COLUMNS": 128, "num_warps": 4},
    ("sm_90", 16384): {"ROWS": 64, "EXPERTS": 64, "INNER": 64, "COLUMNS": 640, "num_warps": 4},
}
CANDIDATES = [
    *(
        {"ROWS": rows, "EXPERTS": experts, "INNER": 0, "COLUMNS": 0, "num_warps": warps}
        for rows in (1, 2, 4)
        for experts in (1, 2)
        for warps in (2, 4)
    ),
    *(
        {"ROWS": rows, "EXPERTS": experts, "INNER": inner, "COLUMNS": columns, "num_warps": 4}
        for rows, experts in ((16, 32), (16, 64), (32, 32), (32, 64), (64, 64), (128, 64))
        for inner, columns in ((64, 64), (128, 128), (64, 256), (128, 512), (64, 640), (128, 16384))
    ),
]
# By the number of tokens: those of a program that chooses.
CHOICE_TABLE = {
    (DEFAULT, 16384): {"ROWS": 4},
    ("sm_90", 1024): {"ROWS": 1},
    ("sm_90", 16384): {"ROWS": 4},
}
CHOICE_CANDIDATES = [{"ROWS": rows} for rows in (1, 2, 4, 8)]


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_by_rows_kernel(
    x,
    weight,
    logits,
    x_stride,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two that holds H
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [T, E] = x @ weight.T in fp32: EXPERTS columns of ROWS tokens."""
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    rows = load_rows(weight, expert, NUM_EXPERTS, H, WIDTH)
    wait_for_inputs(PDL)
    first = tl.program_id(0) * ROWS
    for token in tl.range(first, tl.minimum(first + ROWS, num_tokens)):
        y = load_vector(x + token * x_stride, H, WIDTH)
        at = logits + token * NUM_EXPERTS + expert
        tl.store(at, dot_rows(rows, y), mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x,
    weight,
    logits,
    x_stride,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [parts, T, E]: x @ weight.T in fp32 over COLUMNS of the inner dimension each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    first = tl.program_id(2) * COLUMNS
    x_rows, weight_rows = x + row.to(tl.int64) * x_stride, weight + expert * H
    row_in, expert_in = row < num_tokens, expert < NUM_EXPERTS
    total = empty_sum(EXPERTS, ROWS, x.dtype.element_ty)
    if COLUMNS == INNER:  # all that it needs of the weight is on its way before x is there
        w = load_columns(weight_rows, expert_in, first, H, INNER)
        wait_for_inputs(PDL)
        a = load_columns(x_rows, row_in, first, H, INNER)
        total = add_exact_product(w, a.T, total, IN_PARTS)
    else:
        wait_for_inputs(PDL)
        for start in tl.range(first, tl.minimum(first + COLUMNS, H), INNER):
            w = load_columns(weight_rows, expert_in, start, H, INNER)
            a = load_columns(x_rows, row_in, start, H, INNER)
            total = add_exact_product(w, a.T, total, IN_PARTS)
    at = (tl.program_id(2).to(tl.int64) * num_tokens + row)[None, :] * NUM_EXPERTS
    tl.store(
        logits + at + expert[:, None],
        total.to(tl.float32),
        mask=expert_in[:, None] & row_in[None, :],
    )


@triton.jit
def choose(
    logits,
    bias,
    weights,
    ids,
    first,
    num_tokens,
    num_experts,
    norm_min,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two that holds all experts
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logits [PARTS, T, E] -> weights, ids [T, k], of the tokens first .. first + ROWS - 1."""
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    experts = tl.arange(0, EXPERTS)[None, :]
    row_in, expert_in = rows < num_tokens, experts < num_experts
    z = tl.zeros([ROWS, EXPERTS], tl.float32)
    for part in tl.static_range(PARTS):
        at = logits + (part * num_tokens + rows) * num_experts + experts
        z += tl.load(at, mask=row_in & expert_in, other=0.0, cache_modifier=".cg")
    z = tl.where(expert_in, z, -float("inf"))
    p = tl.exp(z - tl.max(z, axis=1, keep_dims=True))
    p = tl.div_rn(p, tl.broadcast_to(tl.sum(p, axis=1, keep_dims=True), p.shape))
    score = p + tl.load(bias + experts, mask=expert_in, other=-float("inf"))
    keys = order_keys(score, experts)  # [ROWS, EXPERTS], all different
    place = tl.full([ROWS, EXPERTS], TOP_K, tl.int32)  # of each expert among the chosen
    for choice in tl.static_range(TOP_K):
        is_best = keys == tl.max(keys, axis=1, keep_dims=True)
        place = tl.where(is_best, choice, place)
        keys = tl.where(is_best, FIRST_KEY, keys)
    chosen = place < TOP_K
    total = tl.sum(tl.where(chosen, p, 0.0), axis=1, keep_dims=True)
    p = tl.div_rn(p, tl.broadcast_to(tl.maximum(total, norm_min), p.shape))
    at, mask = rows * TOP_K + place, row_in & chosen
    tl.store(weights + at, p, mask=mask)
    tl.store(ids + at, tl.broadcast_to(experts, place.shape).to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits,
    bias,
    weights,
    ids,
    num_tokens,
    num_experts,
    norm_min,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    choose(
        logits,
        bias,
        weights,
        ids,
        tl.program_id(0) * ROWS,
        num_tokens,
        num_experts,
        norm_min,
        TOP_K,
        EXPERTS,
        PARTS,
        ROWS,
    )


def router_triton(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """As router_torch; the rows of x contiguous."""
    (num_tokens, hidden), num_experts = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous() and bias.is_contiguous()
    assert weight.dtype == bias.dtype == torch.float32
    device = x.device
    options = dict(pick(TABLE, device, num_tokens))
    rows, experts = options["ROWS"], options["EXPERTS"]
    columns = min(options.pop("COLUMNS"), hidden) or hidden
    parts = triton.cdiv(hidden, columns)
    logits = torch.empty(parts, num_tokens, num_experts, dtype=torch.float32, device=device)
    arguments = x, weight, logits, x.stride(0), num_tokens
    sizes = {"NUM_EXPERTS": num_experts, "H": hidden, **options, **overlap(device)}
    grid = triton.cdiv(num_tokens, rows), triton.cdiv(num_experts, experts), parts
    if options["INNER"]:
        in_parts = x.dtype == torch.bfloat16 and not knobs.runtime.interpret  # wrong in bf16
        _logits_kernel[grid](*arguments, COLUMNS=columns, IN_PARTS=in_parts, **sizes)
    else:
        del sizes["INNER"]
        _logits_by_rows_kernel[grid](*arguments, WIDTH=triton.next_power_of_2(hidden), **sizes)
    weights = torch.empty(num_tokens, top_k, dtype=x.dtype, device=device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    launch = pick(CHOICE_TABLE, device, num_tokens)
    _choose_kernel[(triton.cdiv(num_tokens, launch["ROWS"]),)](
        *(logits, bias, weights, ids, num_tokens, num_experts, norm_min),
        TOP_K=top_k,
        EXPERTS=triton.next_power_of_2(num_experts),
        PARTS=parts,
        num_warps=1,
        **launch,
        **overlap(device),
        enable_fp_fusion=False,  # p + bias is rounded as the twin rounds it
    )
    return weights, ids


def router_torch(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [E, H] fp32, bias [E] fp32 -> (weights [T, k] as x, ids [T, k] int64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    p = F.linear(x.to(dtype), weight.to(dtype)).softmax(dim=-1)  # [T, E]
    ids = (p + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = p.gather(1, ids)
    chosen = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return chosen.to(x.dtype), ids


IMPLEMENTATIONS = {"router": {"triton": router_triton, "torch": router_torch}}
