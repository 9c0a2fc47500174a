"""Choice of experts, in fp32 from the product to the weights.

    p = softmax(x @ weight.T);  ids = the top_k largest of p + bias, best first
    w = p[ids] / max(sum p[ids], norm_min)

The bias only selects. Trained biases stand near +22..+63 and differ by hundredths, so neither
the product, the bias nor p + bias may be rounded below fp32. Even there exact ties occur: they
go to the lower expert id.

The Triton kernels: a product into logits in memory, then the choice, a program for some tokens. A
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

from ernie_engine.kernels.launch import DEFAULT, overlap, pick, wait_for_inputs
from ernie_engine.kernels.ordering import FIRST_KEY, order_keys
from ernie_engine.kernels.products import add_exact_product, empty_sum

# By the number of tokens. ROWS 1: a sum for each logit, else products of tiles.
TABLE = {
    (DEFAULT, 16): {"ROWS": 1, "EXPERTS": 2, "INNER": 1024, "num_warps": 4, "num_stages": 2},
    (DEFAULT, 1024): {"ROWS": 16, "EXPERTS": 16, "INNER": 64, "num_warps": 4, "num_stages": 3},
    (DEFAULT, 16384): {"ROWS": 64, "EXPERTS": 64, "INNER": 32, "num_warps": 8, "num_stages": 3},
    ("sm_90", 1): {"ROWS": 1, "EXPERTS": 1, "INNER": 1024, "num_warps": 4, "num_stages": 2},
    ("sm_90", 16): {"ROWS": 1, "EXPERTS": 2, "INNER": 1024, "num_warps": 2, "num_stages": 2},
    ("sm_90", 64): {"ROWS": 1, "EXPERTS": 4, "INNER": 1024, "num_warps": 2, "num_stages": 2},
    ("sm_90", 256): {"ROWS": 1, "EXPERTS": 8, "INNER": 1024, "num_warps": 2, "num_stages": 2},
    ("sm_90", 1024): {"ROWS": 16, "EXPERTS": 32, "INNER": 64, "num_warps": 4, "num_stages": 3},
    ("sm_90", 16384): {"ROWS": 64, "EXPERTS": 64, "INNER": 128, "num_warps": 4, "num_stages": 3},
}
CANDIDATES = [
    *(
        {"ROWS": 1, "EXPERTS": experts, "INNER": 1024, "num_warps": warps, "num_stages": 2}
        for experts in (1, 2, 4, 8)
        for warps in (2, 4)
    ),
    *(
        {"ROWS": rows, "EXPERTS": experts, "INNER": inner, "num_warps": 4, "num_stages": stages}
        for rows, experts in ((16, 16), (16, 32), (16, 64), (32, 32), (32, 64), (64, 64), (128, 64))
        for inner in (32, 64, 128)
        for stages in (3, 4)
    ),
]
CHOICE_ROWS = 4  # tokens of a program that chooses


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x,
    weight,
    logits,
    x_stride,
    num_tokens,
    num_experts,
    hidden,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [T, E] = x @ weight.T in fp32: a program owns a tile."""
    wait_for_inputs(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)[:, None]
    total = empty_sum(EXPERTS, ROWS, x.dtype.element_ty)
    for start in range(0, hidden, INNER):
        inner = start + tl.arange(0, INNER)[None, :]
        row_mask = (rows < num_tokens) & (inner < hidden)
        a = tl.load(x + rows.to(tl.int64) * x_stride + inner, mask=row_mask, other=0.0)
        expert_mask = (experts < num_experts) & (inner < hidden)
        b = tl.load(weight + experts * hidden + inner, mask=expert_mask, other=0.0)
        if ROWS == 1:
            total += tl.sum(a.to(tl.float32) * b, axis=1)[:, None]
        else:
            total = add_exact_product(b, a.T, total, IN_PARTS)
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    mask = (experts < num_experts) & (columns < num_tokens)
    at = logits + columns.to(tl.int64) * num_experts + experts
    tl.store(at, total.to(tl.float32), mask=mask)


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
    EXPERTS: tl.constexpr,  # powers of two that hold all experts and all choices
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logits [T, E] -> weights, ids [T, k], of the tokens first .. first + ROWS - 1."""
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    experts, choices = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOICES)[None, :]
    row_in, expert_in = rows < num_tokens, experts < num_experts
    at = logits + rows * num_experts + experts
    z = tl.load(at, mask=row_in & expert_in, other=-float("inf"), cache_modifier=".cg")
    z = tl.where(row_in, z, 0.0)  # what is not stored had better not be NaN
    p = tl.exp(z - tl.max(z, axis=1, keep_dims=True))
    p = tl.div_rn(p, tl.broadcast_to(tl.sum(p, axis=1, keep_dims=True), p.shape))
    score = p + tl.load(bias + experts, mask=expert_in, other=-float("inf"))
    keys = order_keys(score, experts)  # [ROWS, EXPERTS], all different
    chosen_p = tl.zeros([ROWS, CHOICES], dtype=tl.float32)
    chosen_id = tl.zeros([ROWS, CHOICES], dtype=tl.int64)
    for choice in range(TOP_K):
        best = tl.max(keys, axis=1, keep_dims=True)
        is_best = keys == best
        best_p = tl.sum(tl.where(is_best, p, 0.0), axis=1, keep_dims=True)
        best_id = tl.sum(tl.where(is_best, experts, 0), axis=1, keep_dims=True)
        chosen_p = tl.where(choices == choice, best_p, chosen_p)
        chosen_id = tl.where(choices == choice, best_id, chosen_id)
        keys = tl.where(is_best, FIRST_KEY, keys)
    total = tl.maximum(tl.sum(chosen_p, axis=1, keep_dims=True), norm_min)
    chosen_p = tl.div_rn(chosen_p, tl.broadcast_to(total, chosen_p.shape))
    at, mask = rows * TOP_K + choices, row_in & (choices < TOP_K)
    tl.store(weights + at, chosen_p, mask=mask)
    tl.store(ids + at, chosen_id, mask=mask)


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
    CHOICES: tl.constexpr,
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
        CHOICES,
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
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    options = pick(TABLE, device, num_tokens)
    tiles = (num_tokens, options["ROWS"]), (num_experts, options["EXPERTS"])
    _logits_kernel[tuple(triton.cdiv(*tile) for tile in tiles)](
        *(x, weight, logits, x.stride(0), num_tokens, num_experts, hidden),
        IN_PARTS=x.dtype == torch.bfloat16 and not knobs.runtime.interpret,  # wrong in bf16
        **options,
        **overlap(device),
    )
    weights = torch.empty(num_tokens, top_k, dtype=x.dtype, device=device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    _choose_kernel[(triton.cdiv(num_tokens, CHOICE_ROWS),)](
        *(logits, bias, weights, ids, num_tokens, num_experts, norm_min),
        TOP_K=top_k,
        EXPERTS=triton.next_power_of_2(num_experts),
        CHOICES=triton.next_power_of_2(top_k),
        ROWS=CHOICE_ROWS,
        num_warps=1,
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
    ids = (p + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = p.gather(1, ids)
    chosen = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return chosen.to(x.dtype), ids


IMPLEMENTATIONS = {"router": {"triton": router_triton, "torch": router_torch}}
