"""What is asked and when: prompts of exact token ids, output lengths, arrival times.

All of it is drawn from one seed, before the clock starts. Never talks to whoever answers.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_engine.config import ModelConfig
from ernie_engine.options import option
from ernie_engine.text.tokenizer import Tokenizer

PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """Fields are named as the flags of scripts/bench.py. ValueError on a bad value, naming it."""

    num_prompts: int = 100
    max_input_len: int = 512
    min_input_len: int | None = option(None, "None: max_input_len")
    max_output_len: int = 128
    min_output_len: int | None = option(None, "None: max_output_len")
    request_rate: float | None = option(None, "requests a second; None: all at once")
    burstiness: float = option(1.0, "shape of the gamma distribution of gaps; 1: Poisson")
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in ("input", "output"):
            low, high = self.bounds(kind)
            if not 1 <= low <= high:
                raise ValueError(f"min_{kind}_len={low} must be from 1 to max_{kind}_len={high}")
        for name, least in (("num_prompts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        for name in ("request_rate", "burstiness"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be above 0 and finite")

    def bounds(self, kind: str) -> tuple[int, int]:
        """The least and the greatest length of an "input" or "output"."""
        low, high = getattr(self, f"min_{kind}_len"), getattr(self, f"max_{kind}_len")
        return high if low is None else low, high

    def check_fits(self, max_model_len: int) -> None:
        """ValueError if a request may be longer than the model's context."""
        total = self.bounds("input")[1] + self.bounds("output")[1]
        if total > max_model_len:
            raise ValueError(
                f"max_input_len + max_output_len = {total} is above max_model_len={max_model_len}"
            )

    @property
    def is_uniform(self) -> bool:
        """All requests are alike and come at once."""
        fixed = all(low == high for low, high in map(self.bounds, ("input", "output")))
        return fixed and self.request_rate is None


GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8}
PROFILES = {"seed": {"num_prompts": 128, "max_input_len": 1024, "max_output_len": 1024}}


@dataclass(frozen=True)
class PlannedRequest:
    """One request: what to send, how many tokens to ask for, and when (seconds from the start)."""

    prompt: list[int]
    output_len: int
    arrival: float = 0.0


def model_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids that prompts for a model are drawn from: its vocabulary without special tokens."""
    special = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    if tokenizer is not None:
        special |= {i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    return usable_ids(config.vocab_size, special)


def usable_ids(vocab_size: int, special_ids: Collection[int] = ()) -> np.ndarray:
    ids = np.setdiff1d(np.arange(vocab_size), np.array(list(special_ids), dtype=np.int64))
    if ids.size == 0:
        raise ValueError(f"vocab_size={vocab_size} leaves no ordinary token to draw prompts from")
    return ids


def random_prompts(
    ids: np.ndarray, lengths: Sequence[int], rng: np.random.Generator
) -> list[list[int]]:
    """Prompts of exactly these lengths, each token drawn uniformly and independently."""
    return [rng.choice(ids, size=length).tolist() for length in lengths]


def plan_requests(spec: WorkloadSpec, ids: np.ndarray, run: int = 0) -> list[PlannedRequest]:
    """The whole workload, in order of arrival; equal arguments give equal workloads.

    Runs of one spec differ in their prompts alone, so that none meets a prefix cache that another
    has filled.
    """
    rng = np.random.default_rng(spec.seed)
    inputs, outputs = (
        rng.integers(low, high + 1, spec.num_prompts).tolist()
        for low, high in (spec.bounds("input"), spec.bounds("output"))
    )
    arrivals = _arrivals(spec, rng).tolist()
    prompts = random_prompts(ids, inputs, np.random.default_rng([spec.seed, run]))
    return [PlannedRequest(*plan) for plan in zip(prompts, outputs, arrivals, strict=True)]


def probe_request(spec: WorkloadSpec, ids: np.ndarray) -> PlannedRequest:
    """One to send before the clock starts: as long as the others, few tokens, another prompt."""
    length, most = spec.bounds("input")[1], spec.bounds("output")[1]
    rng = np.random.default_rng([spec.seed, 0, 1])
    return PlannedRequest(random_prompts(ids, [length], rng)[0], min(PROBE_TOKENS, most))


def _arrivals(spec: WorkloadSpec, rng: np.random.Generator) -> np.ndarray:
    """Seconds from the start, the first at 0. Gaps have a mean of 1 / request_rate."""
    if spec.request_rate is None:
        return np.zeros(spec.num_prompts)
    scale = 1 / (spec.request_rate * spec.burstiness)
    gaps = rng.gamma(spec.burstiness, scale, spec.num_prompts - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])
