"""Logits to tokens and log-probabilities, by each slot's own sampling values.

Order of operations as in vLLM: min_tokens and logit_bias, penalties, (greedy ends here)
temperature, min-p, top-k, top-p, Gumbel-max. Never part of the model's graph. Owns what it has
read of the rows it drew for last: most steps draw for the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_engine.engine.plan import SamplingSpec
from ernie_engine.kernels.registry import Ops
from ernie_engine.model.slots import FLOATS, INTS, PENALTIES, Slots, to_device


class LogprobTensors(NamedTuple):
    """For N tokens: logprob [N] fp32, rank [N], top_ids and top_logprobs [N, K]."""

    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Rows:
    """What R rows' sampling values ask for, on the device; it holds as long as slot_ids and specs
    do. Indices of rows and tokens are None where no row asks."""

    slot_ids: Sequence[int]
    specs: Sequence[SamplingSpec]
    values: dict[str, Tensor]  # of FLOATS and INTS: [R]
    banned: Tensor | None  # [2, N] int64: row, token
    biased: Tensor | None  # the same
    biases: Tensor | None  # [N] fp32, of those
    penalised: Tensor | None  # [N] int64: rows
    draws: bool  # is any row not greedy?
    filters: bool  # has any such row a top-k or a top-p?

    def are(self, slot_ids: Sequence[int], specs: Sequence[SamplingSpec]) -> bool:
        """A request that has got another one's slot came with an object of its own."""
        return self.slot_ids == slot_ids and all(map(is_, self.specs, specs))

    @property
    def change_logits(self) -> bool:
        asked = self.banned, self.biased, self.penalised
        return any(indices is not None for indices in asked)


def read_rows(
    state: Slots, slot_ids: Sequence[int], specs: Sequence[SamplingSpec], slots: Tensor
) -> Rows:
    """`slots` is slot_ids [R], and `specs` are theirs."""
    device = state.device
    values: dict[str, Tensor] = dict(zip(FLOATS, state.floats[slots].unbind(1), strict=True))
    values |= dict(zip(INTS, state.ints[slots].unbind(1), strict=True))
    banned = [(i, t) for i, s in enumerate(specs) if s.min_tokens for t in s.banned_ids]
    biased = [(i, t) for i, s in enumerate(specs) for t in s.bias_ids]
    biases = [bias for s in specs for bias in s.bias_values]
    penalised = [i for i, spec in enumerate(specs) if _has_penalty(spec)]

    def indices(columns: Sequence) -> Tensor | None:
        return to_device(columns, torch.int64, device) if columns else None

    return Rows(
        slot_ids=slot_ids,
        specs=specs,
        values=values,
        banned=indices(list(zip(*banned, strict=True))),
        biased=indices(list(zip(*biased, strict=True))),
        biases=to_device(biases, torch.float32, device) if biases else None,
        penalised=indices(penalised),
        draws=any(spec.temperature > 0 for spec in specs),
        filters=any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) for s in specs),
    )


class Sampler:
    def __init__(self, ops: Ops, state: Slots):
        self.ops, self.state = ops, state
        self._last: Rows | None = None

    def draw(
        self, logits: Tensor, slot_ids: Sequence[int], slots: Tensor, positions: Tensor
    ) -> Tensor:
        """One token [R] int64 for each row of logits [R, V] fp32, to stand at `positions` [R]
        int64; `slots` [R] int64 is slot_ids."""
        rows = self._rows(slot_ids, slots)
        if rows.change_logits:
            logits = self._adjust(logits, rows, slots, positions)
        values = rows.values
        return self.ops.sample(
            logits,
            values["temperature"],
            values["top_k"],
            values["top_p"],
            values["min_p"],
            values["seed"],
            positions,
            rows.draws,
            rows.filters,
        )

    def _rows(self, slot_ids: Sequence[int], slots: Tensor) -> Rows:
        specs = [self.state.specs[slot] for slot in slot_ids]
        if self._last is None or not self._last.are(slot_ids, specs):
            self._last = read_rows(self.state, slot_ids, specs, slots)
        return self._last

    def _adjust(self, logits: Tensor, rows: Rows, slots: Tensor, positions: Tensor) -> Tensor:
        """Bans, biases and penalties, on a copy: the raw logits are still wanted."""
        logits = logits.clone()
        if rows.banned is not None:
            at, ids = rows.banned
            num_drawn = positions - self.state.prompt_lens[slots]
            too_short = num_drawn < rows.values["min_tokens"]
            logits[at, ids] = logits[at, ids].masked_fill(too_short[at], float("-inf"))
        if rows.biased is not None and rows.biases is not None:
            at, ids = rows.biased
            logits[at, ids] += rows.biases
        if rows.penalised is not None:
            at = rows.penalised
            logits[at] = self._penalise(logits[at], slots[at], positions[at], rows)
        return logits

    def _penalise(self, logits: Tensor, slots: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        """Of the penalised rows alone."""
        count, history, vocab_size = self.ops.token_counts, self.state.history, logits.shape[1]
        prompt_lens = self.state.prompt_lens[slots]
        nothing = torch.zeros_like(prompt_lens)
        in_prompt = count(history, slots, nothing, prompt_lens, vocab_size) > 0
        in_answer = count(history, slots, prompt_lens, positions, vocab_size)
        penalties = (rows.values[name][rows.penalised] for name in PENALTIES)
        return self.ops.apply_penalties(logits, in_prompt, in_answer, *penalties)

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
        """The model's own log-probabilities, before anything in draw() touched them."""
        return LogprobTensors(*self.ops.token_logprobs(logits, tokens, num_top))


def _has_penalty(spec: SamplingSpec) -> bool:
    penalties = spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty
    return penalties != (1.0, 0.0, 0.0)
