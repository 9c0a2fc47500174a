"""What a model knows of held-out conversations, by teacher forcing: no generation, one forward.

An answer counts as right if every one of its tokens is the most likely one, which is when greedy
generation would write it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch
from .corpus import FIRST_TASK, PAD, Rows, encode
from .model import TinyModel
from .tasks import TASK_NAMES, held_out
from .tokenizer import ChatEncoder

_TOKENS_AT_ONCE = 65536


class Probe:
    """A fixed set of held-out conversations of every task, one a row."""

    def __init__(self, encoder: ChatEncoder, samples: int, seed: int, device: str):
        self.batches = {
            task: Batch.from_arrays(vars(_rows(encoder, task, samples, seed)), device)
            for task in TASK_NAMES
        }

    @torch.no_grad()
    def accuracy(self, model: TinyModel) -> dict[str, float]:
        """Share of conversations with every answer token right, by task."""
        return {
            task: float(torch.cat([_all_right(model, b) for b in _pieces(batch)]).double().mean())
            for task, batch in self.batches.items()
        }

    @torch.no_grad()
    def drafting(self, model: TinyModel) -> dict[str, float]:
        """Share of tokens t+2 that the MTP block finds at t: among answer tokens, and among all."""
        counts = torch.zeros(4, dtype=torch.float64)  # right and all of answers, of everything
        for batch in self.batches.values():
            for piece in _pieces(batch):
                counts += _draft_counts(model, piece).double().cpu()
        right, answers, right_all, everything = counts.tolist()
        return {"answers": right / answers, "all_tokens": right_all / everything}


def _rows(encoder: ChatEncoder, task: str, samples: int, seed: int) -> Rows:
    documents = [encode(encoder, sample) for sample in held_out(task, samples, seed)]
    longest = max(len(ids) for ids, _ in documents)
    rows = Rows(len(documents), -(-longest // 8) * 8)
    for row, document in enumerate(documents):
        rows.put(row, 0, 1, *document)
    return rows


def _pieces(batch: Batch) -> Iterator[Batch]:
    count, length = batch.tokens.shape
    step = max(1, _TOKENS_AT_ONCE // length)
    return (batch.rows(start, start + step) for start in range(0, count, step))


def _predictions(model: TinyModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Most likely t+1 and t+2 of every slot, [B, T] each."""
    logits, drafts = model(batch.tokens, batch.positions(), batch.mask(model.dtype()))
    return logits.argmax(-1), drafts.argmax(-1)


def _all_right(model: TinyModel, batch: Batch) -> Tensor:
    target, classes = batch.ahead(1)
    predicted, _ = _predictions(model, batch)
    return ((predicted == target) | (classes < FIRST_TASK)).all(dim=1)


def _draft_counts(model: TinyModel, batch: Batch) -> Tensor:
    target, classes = batch.ahead(2)
    _, drafted = _predictions(model, batch)
    right, answer, real = drafted == target, classes >= FIRST_TASK, classes != PAD
    return torch.stack(((right & answer).sum(), answer.sum(), (right & real).sum(), real.sum()))
