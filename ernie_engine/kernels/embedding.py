"""Token embedding: y[t] = weight[ids[t]].

Owns the row gather alone. Never masks or shifts ids: a table cut over ranks is its caller's
business. Unscaled, as ERNIE-4.5 has it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch gives ints where a kernel has constexprs, and options that it does not have)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program; a row is at most 8192 wide


@triton.jit
def _embedding_kernel(ids, weight, out, weight_stride, hidden, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    row = tl.load(ids + token)  # int64: a table has more than 2^31 bytes
    values = tl.load(weight + row * weight_stride + columns, mask=inside)
    tl.store(out + token * hidden + columns, values, mask=inside)


def embedding_triton(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [T] int64, weight [V, H], rows contiguous -> [T, H] in the weight's dtype."""
    num_tokens, hidden = ids.shape[0], weight.shape[1]
    assert ids.is_contiguous() and weight.stride(1) == 1
    out = torch.empty(num_tokens, hidden, dtype=weight.dtype, device=weight.device)
    grid = num_tokens, triton.cdiv(hidden, BLOCK)
    _embedding_kernel[grid](ids, weight, out, weight.stride(0), hidden, BLOCK=BLOCK)
    return out


def embedding_torch(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [T] int64, weight [V, H] -> [T, H] in the weight's dtype."""
    return F.embedding(ids, weight)


IMPLEMENTATIONS = {"embedding": {"triton": embedding_triton, "torch": embedding_torch}}
