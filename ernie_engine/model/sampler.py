"""Logits to tokens and log-probabilities, by each slot's own sampling values.

Order of operations as in vLLM: min_tokens and logit_bias, penalties, (greedy ends here)
temperature, min-p, top-k, top-p, Gumbel-max. Never part of the model's graph; owns no state.
"""

from collections.abc import Sequence
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


class Sampler:
    def __init__(self, ops: Ops, state: Slots):
        self.ops, self.state = ops, state

    def draw(self, logits: Tensor, slot_ids: Sequence[int], slots: Tensor) -> Tensor:
        """One token [R] int64 for each row of logits [R, V] fp32; `slots` is slot_ids [R]."""
        state = self.state
        specs = [state.specs[slot] for slot in slot_ids]
        positions = state.num_computed[slots]
        values: dict[str, Tensor] = dict(zip(FLOATS, state.floats[slots].unbind(1), strict=True))
        values |= dict(zip(INTS, state.ints[slots].unbind(1), strict=True))
        logits = self._adjust(logits, specs, slots, positions, values)
        return self.ops.sample(
            logits,
            values["temperature"],
            values["top_k"],
            values["top_p"],
            values["min_p"],
            values["seed"],
            positions,
        )

    def _adjust(
        self,
        logits: Tensor,
        specs: Sequence[SamplingSpec],
        slots: Tensor,
        positions: Tensor,
        values: dict[str, Tensor],
    ) -> Tensor:
        """Bans, biases and penalties, on a copy: the raw logits are still wanted."""
        banned = [(i, t) for i, s in enumerate(specs) if s.min_tokens for t in s.banned_ids]
        biased = [
            (i, t, b)
            for i, s in enumerate(specs)
            for t, b in zip(s.bias_ids, s.bias_values, strict=True)
        ]
        penalised = [i for i, spec in enumerate(specs) if _has_penalty(spec)]
        if not (banned or biased or penalised):
            return logits
        logits, device = logits.clone(), logits.device
        if banned:
            rows, ids = to_device(list(zip(*banned, strict=True)), torch.int64, device)
            too_short = positions - self.state.prompt_lens[slots] < values["min_tokens"]
            allowed = logits[rows, ids].masked_fill(too_short[rows], float("-inf"))
            logits[rows, ids] = allowed
        if biased:
            rows, ids, biases = zip(*biased, strict=True)
            at = to_device([rows, ids], torch.int64, device)
            logits[at[0], at[1]] += to_device(biases, torch.float32, device)
        if penalised:
            rows = to_device(penalised, torch.int64, device)
            logits[rows] = self._penalise(logits[rows], slots[rows], positions[rows], values, rows)
        return logits

    def _penalise(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        values: dict[str, Tensor],
        rows: Tensor,
    ) -> Tensor:
        count, history, vocab_size = self.ops.token_counts, self.state.history, logits.shape[1]
        prompt_lens = self.state.prompt_lens[slots]
        nothing = torch.zeros_like(prompt_lens)
        in_prompt = count(history, slots, nothing, prompt_lens, vocab_size) > 0
        in_answer = count(history, slots, prompt_lens, positions, vocab_size)
        penalties = (values[name][rows] for name in PENALTIES)
        return self.ops.apply_penalties(logits, in_prompt, in_answer, *penalties)

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
        """The model's own log-probabilities, before anything in draw() touched them."""
        return LogprobTensors(*self.ops.token_logprobs(logits, tokens, num_top))


def _has_penalty(spec: SamplingSpec) -> bool:
    penalties = spec.repetition_penalty - 1.0, spec.frequency_penalty, spec.presence_penalty
    return any(penalty != 0.0 for penalty in penalties)
