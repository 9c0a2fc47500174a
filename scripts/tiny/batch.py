"""Packed rows on the device: positions, the mask between conversations, loss weights; and the
losses.

A token attends to its own conversation only, and positions count from its start, so a packed row
computes what its conversations would alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .corpus import FIRST_TASK, PAD
from .tasks import TASK_NAMES

NUM_CLASSES = FIRST_TASK + len(TASK_NAMES)


@dataclass(frozen=True)
class Batch:
    """Rows of one step, each [B, T], int64."""

    tokens: Tensor
    classes: Tensor
    documents: Tensor

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], device: str) -> "Batch":
        """From arrays of any integer type under the names of the fields."""
        names = ("tokens", "classes", "documents")
        return Batch(
            *(torch.from_numpy(arrays[name].astype(np.int32)).to(device).long() for name in names)
        )

    def rows(self, start: int, stop: int) -> "Batch":
        return Batch(*(a[start:stop] for a in (self.tokens, self.classes, self.documents)))

    def positions(self) -> Tensor:
        """Place of each token in its conversation, [B, T]."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        first = self.documents != self.documents.roll(1, dims=1)
        first[:, 0] = True
        return place - torch.where(first, place, 0).cummax(dim=1).values

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive: 0 for a token of the same conversation that is not later, else -inf; [B, 1, T,
        T].
        """
        same = self.documents[:, :, None] == self.documents[:, None, :]
        seen = same.tril()[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, float("-inf")
        )

    def ahead(self, distance: int) -> tuple[Tensor, Tensor]:
        """Token and class `distance` places later, [B, T]; class PAD where that is another
        conversation.
        """
        tokens, classes, documents = (
            a.roll(-distance, dims=1) for a in (self.tokens, self.classes, self.documents)
        )
        inside = documents == self.documents
        inside[:, -distance:] = False
        return tokens, torch.where(inside, classes, PAD)


def class_weights(context_weight: float, device: str) -> Tensor:
    """Loss weight by token class: none for padding, little for context, one for answers."""
    return torch.tensor([0.0, context_weight] + [1.0] * len(TASK_NAMES), device=device)


def weighted_loss(
    logits: Tensor, target: Tensor, classes: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy, and per class the sums (loss, tokens) as [2, NUM_CLASSES]."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), reduction="none"
    )
    weight = weights[classes.flatten()]
    with torch.no_grad():
        numbers = torch.arange(NUM_CLASSES, device=classes.device)
        one_hot = (classes.flatten()[:, None] == numbers).float()
        sums = torch.stack((losses.detach() @ one_hot, one_hot.sum(0)))
    return (losses * weight).sum() / weight.sum(), sums
