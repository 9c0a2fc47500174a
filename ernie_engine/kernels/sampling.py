"""The next token of each row: greedy, or a draw from the filtered distribution.

Order: temperature, min-p, top-k, top-p; then Gumbel-max, argmax(z + noise), which draws from
softmax(z). The noise depends on (seed, position, token id) alone, so a row's draw never depends
on the rows beside it. Every tie goes to the lower token id. Logits may hold -inf (a forbidden
token), never +inf or NaN, and a row always has a finite one.
"""

import torch
from torch import Tensor

from ernie_engine.kernels.philox import gumbel_noise


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """logits [R, V] with -inf for what top-k, then top-p over the rest, leave out.

    top_k [R] (0 = off): exactly k tokens. top_p [R] (1 = off): the fewest tokens, best first,
    whose probability reaches top_p, at least one. Sums are fp64: equal on every device.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    k = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    p = ordered.double().masked_fill(rank >= k, -torch.inf).softmax(dim=-1)
    before = p.cumsum(dim=-1) - p  # probability of all better tokens
    out_of = (rank >= k) | ((before >= top_p[:, None]) & (rank > 0))
    return torch.empty_like(logits).scatter_(1, ids, ordered.masked_fill(out_of, -torch.inf))


def sample_torch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """logits [R, V] fp32; temperature (0 = greedy), top_p (1 = off), min_p (0 = off) [R] fp32;
    top_k [R] int (0 = off); seeds, positions [R] int64 -> token ids [R] int64.

    min-p keeps tokens with at least min_p times the probability of the best one.
    """
    greedy = logits.argmax(dim=-1)
    drawn = temperature > 0
    if not drawn.any():
        return greedy
    # Shifting by the maximum changes no probability, keeps tiny temperatures from overflowing,
    # and makes min-p a comparison: log(p / p_best) is the shifted logit itself.
    z = logits - logits.amax(dim=-1, keepdim=True)
    z = z / torch.where(drawn, temperature, 1.0)[:, None]
    z = z.masked_fill(z < min_p.double().log().float()[:, None], -torch.inf)
    rows = (drawn & ((top_k > 0) | (top_p < 1))).nonzero().flatten()
    if rows.numel():  # only these pay for a sort
        z[rows] = _keep_top(z[rows], top_k[rows], top_p[rows])
    choice = (z + gumbel_noise(seeds, positions, logits.shape[1])).argmax(dim=-1)
    return torch.where(drawn, choice, greedy)


IMPLEMENTATIONS = {"sample": {"torch": sample_torch}}
