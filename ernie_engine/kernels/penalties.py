"""Penalties on tokens that stand in the text already, and the counting of those tokens.

    repetition:  z / r if z > 0 else z * r,  for tokens of the prompt or of the output
    frequency:   z - f * (times generated)
    presence:    z - a  if generated at all

in this order, with the meaning of vLLM and of OpenAI's API. Neutral values (1, 0, 0) leave a
row's logits as they are, bit for bit.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens of a program; both kernels only move memory


@triton.jit
def _token_counts_kernel(
    history, slots, starts, ends, counts, history_stride, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start, end = tl.load(starts + row), tl.load(ends + row)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (position >= start) & (position < end)
    line = history + tl.load(slots + row) * history_stride
    tokens = tl.load(line + position, mask=inside, other=0)
    # A sum of integers is the same in any order.
    tl.atomic_add(counts + row.to(tl.int64) * vocab_size + tokens, 1, mask=inside, sem="relaxed")


def token_counts_triton(
    history: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, vocab_size: int
) -> Tensor:
    """As token_counts_torch; the lines of history contiguous."""
    num_rows, length = len(slots), history.shape[1]
    assert history.stride(1) == 1
    slots, starts, ends = slots.contiguous(), starts.contiguous(), ends.contiguous()
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=history.device)
    grid = num_rows, triton.cdiv(length, BLOCK)
    _token_counts_kernel[grid](
        history, slots, starts, ends, counts, history.stride(0), vocab_size, BLOCK=BLOCK
    )
    return counts


@triton.jit
def _apply_penalties_kernel(
    logits,
    prompt_mask,
    output_counts,
    repetitions,
    frequencies,
    presences,
    out,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    at = row.to(tl.int64) * vocab_size + tokens
    z = tl.load(logits + at, mask=inside)
    in_prompt = tl.load(prompt_mask + at, mask=inside) != 0
    count = tl.load(output_counts + at, mask=inside)
    repetition = tl.load(repetitions + row)
    repeated = tl.where(z > 0, tl.div_rn(z, repetition), z * repetition)
    z = tl.where(in_prompt | (count > 0), repeated, z)
    z -= tl.load(frequencies + row) * count.to(tl.float32)
    z -= tl.load(presences + row) * (count > 0).to(tl.float32)
    tl.store(out + at, z, mask=inside)


def apply_penalties_triton(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """As apply_penalties_torch, with its bits: quotients are exact and nothing is fused."""
    num_rows, vocab_size = logits.shape
    wide = logits.contiguous(), prompt_mask.contiguous().view(torch.uint8)
    columns = (penalty.contiguous() for penalty in (repetition, frequency, presence))
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    grid = num_rows, triton.cdiv(vocab_size, BLOCK)
    _apply_penalties_kernel[grid](
        *(*wide, output_counts.contiguous(), *columns, out, vocab_size),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return out


def token_counts_torch(
    history: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, vocab_size: int
) -> Tensor:
    """How often each token stands in history[slot, start:end], row by row.

    history [S, L] int32, slots, starts, ends [R] int -> [R, vocab_size] int32. What stands
    outside start:end may be anything.
    """
    position = torch.arange(history.shape[1], device=history.device)
    inside = (position >= starts[:, None]) & (position < ends[:, None])  # [R, L]
    tokens = history[slots].long().masked_fill_(~inside, 0)
    counts = torch.zeros(len(slots), vocab_size, dtype=torch.int32, device=history.device)
    return counts.scatter_add_(1, tokens, inside.int())


def apply_penalties_torch(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """logits [R, V] fp32, prompt_mask [R, V] bool (the token is in the prompt), output_counts
    [R, V] int32 (times generated), three penalties [R] fp32 -> new logits [R, V]."""
    generated = output_counts > 0
    repetition = repetition[:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt_mask | generated, repeated, logits)
    logits = logits - frequency[:, None] * output_counts
    return logits - presence[:, None] * generated


IMPLEMENTATIONS = {
    "token_counts": {"triton": token_counts_triton, "torch": token_counts_torch},
    "apply_penalties": {"triton": apply_penalties_triton, "torch": apply_penalties_torch},
}
