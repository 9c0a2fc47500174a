"""Log-probabilities of given tokens and of the best ones, from raw logits.

    logprob[v] = z[v] - log(sum_u exp(z[u]))

Tokens are ordered by logit, equal logits by the lower id: rank r is the r-th of top_ids.
Never sees temperature, penalties or filters: callers hand over the logits they mean.
"""

import torch
from torch import Tensor


def _order_keys(logits: Tensor) -> Tensor:
    """logits [R, V] fp32 -> [R, V] int64, all different: larger means earlier in the order.

    The high word is the float's bits made to sort as integers, the low word falls with the id.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards
    return (ordered << 32) - torch.arange(logits.shape[1], device=logits.device)


def token_logprobs_torch(
    logits: Tensor, tokens: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] fp32, tokens [R] int64, num_top <= V -> (logprob [R] fp32 and rank [R] int64,
    1 = highest, of the tokens; top_ids [R, num_top] int64, top_logprobs [R, num_top] fp32)."""
    logprobs = logits.log_softmax(dim=-1)
    keys = _order_keys(logits)
    tokens = tokens[:, None]
    rank = (keys >= keys.gather(1, tokens)).sum(dim=-1)
    top_ids = keys.topk(num_top, dim=-1).indices
    return logprobs.gather(1, tokens)[:, 0], rank, top_ids, logprobs.gather(1, top_ids)


IMPLEMENTATIONS = {"token_logprobs": {"torch": token_logprobs_torch}}
