"""Penalties on tokens that stand in the text already, and the counting of those tokens.

    repetition:  z / r if z > 0 else z * r,  for tokens of the prompt or of the output
    frequency:   z - f * (times generated)
    presence:    z - a  if generated at all

in this order, with the meaning of vLLM and of OpenAI's API. Neutral values (1, 0, 0) leave a
row's logits as they are, bit for bit.
"""

import torch
from torch import Tensor


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
    "token_counts": {"torch": token_counts_torch},
    "apply_penalties": {"torch": apply_penalties_torch},
}
