"""Tokens that a step in flight was promised and that the last stage is still to send: the first
stage writes each where the next step reads it, no earlier than one does.

Owns the receipts, oldest first. Where one stage is all, there is nothing to wait for.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_engine.model.slots import Slots, to_device
from ernie_engine.parallel.pipe import Pipe, Receipt


@dataclass
class _Promise:
    receipt: Receipt
    slot_ids: list[int | None]  # None: the request has ended, its token is dropped
    slots: Tensor
    positions: Tensor


class Promises:
    """`most` promises are kept; older ones have long come true."""

    def __init__(self, pipe: Pipe, state: Slots, most: int):
        self._pipe, self._state, self._most = pipe, state, most
        self._open: deque[_Promise] = deque()

    def expect(self, slot_ids: Sequence[int], slots: Tensor) -> None:
        """The step just launched draws a token for each slot [R]."""
        while len(self._open) >= self._most:
            self._keep(self._open.popleft())
        receipt = self._pipe.expect_tokens(len(slot_ids))
        positions = self._state.next_positions(slots)
        self._open.append(_Promise(receipt, list(slot_ids), slots, positions))

    def drop(self, freed: Collection[int]) -> None:
        """These slots' requests have ended: what still comes for them is nobody's."""
        for promise in self._open if freed else ():
            promise.slot_ids = [None if slot in freed else slot for slot in promise.slot_ids]

    def keep(self, slot_ids: Collection[int]) -> None:
        """Write what these slots' next step reads."""
        needed = set(slot_ids) if self._open else set()
        while any(needed.intersection(promise.slot_ids) for promise in self._open):
            self._keep(self._open.popleft())

    def _keep(self, promise: _Promise) -> None:
        tokens = promise.receipt.wait()
        kept = [i for i, slot in enumerate(promise.slot_ids) if slot is not None]
        if len(kept) == len(tokens):
            self._state.write(promise.slots, promise.positions, tokens)
        elif kept:
            rows = to_device(kept, torch.int64, tokens.device)
            self._state.write(promise.slots[rows], promise.positions[rows], tokens[rows])
