"""Cases of what happens to logits: penalties, the draw, log-probabilities.

Rows see the whole vocabulary on every rank, so these depend on the number of rows alone.
"""

from collections.abc import Iterator

import torch

from ernie_engine.bench.floors import Work
from ernie_engine.bench.kernels.case import KernelCase
from ernie_engine.bench.kernels.checking import same_bits
from ernie_engine.bench.kernels.shapes import SHAPES, VOCAB, RankShape

MAX_ROWS = 256
HISTORY_LEN = 32768
NUM_TOP = 20
# temperature, top_k, top_p, min_p
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_p": (0.8, 0, 0.8, 0.0),
    "top_k": (0.8, 50, 1.0, 0.0),
    "all": (0.8, 50, 0.9, 0.02),
}


def token_counts_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    if not _is_asked(shape, tokens):
        return

    def make(device):
        history = torch.randint(0, VOCAB, (tokens, HISTORY_LEN), dtype=torch.int32, device=device)
        slots = torch.randperm(tokens, device=device)
        starts = torch.zeros(tokens, dtype=torch.int64, device=device)
        return history, slots, starts, starts + HISTORY_LEN // 2, VOCAB

    moved = tokens * (HISTORY_LEN // 2 + VOCAB) * 4
    yield KernelCase("token_counts", "16k tokens", tokens, make, Work(moved, 0), same_bits)


def apply_penalties_cases(
    shape: RankShape, tokens: int, dtype: torch.dtype
) -> Iterator[KernelCase]:
    if not _is_asked(shape, tokens):
        return

    def make(device):
        counts = torch.randint(0, 3, (tokens, VOCAB), dtype=torch.int32, device=device)
        mask = torch.rand(tokens, VOCAB, device=device) < 0.1
        penalties = (torch.rand(tokens, device=device) + 0.5 for _ in range(3))
        return _logits(tokens, device), mask, counts, *penalties

    yield KernelCase("apply_penalties", "", tokens, make, Work(tokens * VOCAB * 13, 0))


def sample_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    if not _is_asked(shape, tokens):
        return
    for name, values in FILTERS.items():

        def make(device, values=values):
            temperature, top_k, top_p, min_p = (
                torch.full((tokens,), value, device=device) for value in values
            )
            seeds = torch.randint(-(2**62), 2**62, (tokens,), device=device)
            positions = torch.randint(0, HISTORY_LEN, (tokens,), device=device)
            columns = temperature, top_k.long(), top_p, min_p
            return _logits(tokens, device), *columns, seeds, positions

        yield KernelCase("sample", name, tokens, make, Work(tokens * VOCAB * 4, 0), same_bits)


def token_logprobs_cases(shape: RankShape, tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    if not _is_asked(shape, tokens):
        return
    for num_top in (0, NUM_TOP):

        def make(device, num_top=num_top):
            ids = torch.randint(0, VOCAB, (tokens,), device=device)
            return _logits(tokens, device), ids, num_top

        label, work = f"top {num_top}", Work(tokens * VOCAB * 4, 0)
        yield KernelCase("token_logprobs", label, tokens, make, work)


def _is_asked(shape: RankShape, tokens: int) -> bool:
    return tokens <= MAX_ROWS and shape is SHAPES["0.3B"]  # once


def _logits(rows: int, device: torch.device) -> torch.Tensor:
    """As a bf16 head gives them, with many equal ones."""
    return (torch.randn(rows, VOCAB, device=device) * 3).bfloat16().float()
