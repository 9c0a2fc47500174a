"""Milliseconds a decode step and prompt tokens a second, beside what the hardware allows.

Decode: (time of n new tokens - time of 1) / (n - 1), all prompts submitted at once. The time of 1
is the mean of a run before and one after, and each of them begins on a card that has rested: one at
its power limit may read a long prompt more slowly right after another, and that would count as
steps. Prefill: the time to one new token. Owns these definitions and the table of cases; runs them
through Engine.generate(), so that the figures are what a user gets.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ernie_engine.bench.floors import (
    DTYPE_BYTES,
    Ceilings,
    Work,
    decode_work,
    mean_context,
    prefill_work,
)
from ernie_engine.bench.memory import MemoryPeak, Peak
from ernie_engine.bench.recorder import Excerpt, Tracer
from ernie_engine.bench.workload import GREEDY, SAMPLED, model_ids, random_prompts
from ernie_engine.engine.engine import Engine
from ernie_engine.engine.request import SamplingParams

REPETITIONS = 3
WARM_UP_TOKENS = 9
REST_S = 1.0
MAX_MODEL_LEN = 33000  # what all cases but 1x131071 need
TRACED_STEPS = 20
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt_len` tokens, behind `cached_len` that were read before; prefill if
    one new token is asked for."""

    name: str
    batch: int
    prompt_len: int
    num_tokens: int
    cached_len: int = 0

    @property
    def is_prefill(self) -> bool:
        return self.num_tokens == 1

    @property
    def total_len(self) -> int:
        return self.cached_len + self.prompt_len + self.num_tokens


CASES = (
    *(Case(f"b={batch}", batch, 128, 256) for batch in (1, 8, 32, 128, 256)),
    Case("b=1@32k", 1, 32000, 64),
    Case("b=32@8k", 32, 8000, 64),
    *(Case(f"{batch}x{n}", batch, n, 1) for batch, n in ((1, 128), (1, 1024))),
    *(Case(f"{batch}x{n}", batch, n, 1) for batch, n in ((16, 1024), (4, 8192), (1, 32768))),
    Case("1x1024@31k", 1, 1024, 1, cached_len=31744),
    Case("1x131071", 1, 131071, 1),  # the longest prompt of the models, for its peak of memory
)


@dataclass(frozen=True)
class CaseResult:
    """`times`: seconds a step (decode) or of the whole prefill, one a repetition. Empty if it was
    skipped; `note` says why, or how the run departs from the definition. `peak`: of a GPU's memory
    meanwhile. `trace`: figures of steps traced after that, as trace.summarize()."""

    case: Case
    times: Sequence[float] = ()
    note: str = ""
    work: Work = field(default=Work(0, 0))
    peak: Peak | None = None
    trace: Mapping[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """The figure: the median of decode repetitions, the best of prefill ones."""
        return min(self.times) if self.case.is_prefill else statistics.median(self.times)


def choose_cases(only: str | None, num_tokens: int | None) -> list[Case]:
    """The cases that `only` names (comma-separated names, "decode", "prefill"; None: all).

    `num_tokens` overrides the new tokens of decode cases, against the definition.
    """
    groups = {case.name: [case] for case in CASES}
    groups["prefill"] = [case for case in CASES if case.is_prefill]
    groups["decode"] = [case for case in CASES if not case.is_prefill]
    names = list(groups)[: len(CASES)] if only is None else only.split(",")
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise ValueError(f"only: no case {', '.join(unknown)}; choose from {', '.join(groups)}")
    if num_tokens is not None and num_tokens < 2:
        raise ValueError(f"num_tokens={num_tokens}: a step takes 2 or more to measure")
    chosen = [case for case in CASES if any(case in groups[name] for name in names)]
    return [
        replace(case, num_tokens=num_tokens) if num_tokens and not case.is_prefill else case
        for case in chosen
    ]


class StepBench:
    """Runs cases against an engine, within `budget_s` seconds from now if that is given.

    A running measurement is not cut off: what would not fit is not begun, or repeated less often.
    Decode is warmed up by WARM_UP_TOKENS; prefill is not, for only its best time counts.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        sampled: bool = False,
        seed: int = 0,
        budget_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        rest: Callable[[float], None] = time.sleep,
        tracer: Tracer | None = None,
    ):
        self.engine, self.clock, self.rest = engine, clock, rest
        self.seed, self.tracer = seed, tracer
        self.params = SamplingParams(**(SAMPLED if sampled else GREEDY), ignore_eos=True)
        self._deadline = float("inf") if budget_s is None else clock() + budget_s
        self._ids = model_ids(engine.model_config, engine.tokenizer)

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """One result a case, as they come."""
        for case in cases:
            reason = self._misfit(case)
            yield CaseResult(case, note=reason) if reason else self._measure(case)

    def _misfit(self, case: Case) -> str:
        """Why the engine or the budget cannot hold a case; empty if they can."""
        config = self.engine.config
        if case.total_len > config.max_model_len:
            return f"skipped: {case.total_len} tokens, max_model_len={config.max_model_len}"
        if case.batch > config.max_num_seqs:
            return f"skipped: max_num_seqs={config.max_num_seqs}"
        blocks = case.batch * -(-case.total_len // config.block_size)
        if blocks > self.engine.num_kv_blocks:
            return f"skipped: {blocks} K/V blocks, {self.engine.num_kv_blocks} there are"
        if config.enable_prefix_caching != bool(case.cached_len):
            wanted = (
                "needs enable_prefix_caching" if case.cached_len else "prefixes would be cached"
            )
            return f"skipped: {wanted}"
        return "skipped: budget_s is spent" if self.clock() >= self._deadline else ""

    def _measure(self, case: Case) -> CaseResult:
        draw, memory = self._prompts_of(case), MemoryPeak(self.engine.config.device)
        expected = 0.0 if case.is_prefill else self._expected_seconds(case, draw())
        times: list[float] = []
        repetitions = self._times(case, draw)
        while len(times) < REPETITIONS:
            began = self.clock()
            if began + expected > self._deadline:
                break
            times.append(next(repetitions))
            expected = self.clock() - began
        if not times:
            return CaseResult(case, note=f"skipped: about {expected:.0f} s a repetition")
        note, work = _departures(case, len(times)), self._work(case)
        result = CaseResult(case, times, note, work, memory.read())
        return self._traced(result, draw, expected)

    def _prompts_of(self, case: Case) -> Callable[[], list[list[int]]]:
        """Gives the prompts of a run: always the same, or, behind prefixes that are read now, with
        ends of their own, which no run before has left in the cache."""
        rng, lengths = np.random.default_rng(self.seed), [case.prompt_len] * case.batch
        if not case.cached_len:
            prompts = random_prompts(self._ids, lengths, rng)
            return lambda: prompts
        prefixes = random_prompts(self._ids, [case.cached_len] * case.batch, rng)
        self._seconds(prefixes, 1)

        def draw() -> list[list[int]]:
            ends = random_prompts(self._ids, lengths, rng)
            return [prefix + end for prefix, end in zip(prefixes, ends, strict=True)]

        return draw

    def _traced(
        self, result: CaseResult, draw: Callable[[], list[list[int]]], expected: float
    ) -> CaseResult:
        """After the times, which it would lengthen, and within the budget as they are."""
        if self.tracer is None:
            return result
        if self.clock() + 2 * expected > self._deadline:  # it may run twice
            notes = [*filter(None, [result.note]), "no trace: budget_s"]
            return replace(result, note="; ".join(notes))
        case = result.case
        excerpt = _excerpt(case, self.engine.config.max_num_batched_tokens)
        trace = self.tracer.trace(
            case.name, excerpt, lambda: self._seconds(draw(), case.num_tokens, case.cached_len)
        )
        return replace(result, trace=trace)

    def _times(self, case: Case, draw: Callable[[], list[list[int]]]) -> Iterator[float]:
        """Of one repetition after the other, as often as asked."""
        if case.is_prefill:
            while True:
                yield self._seconds(draw(), 1, case.cached_len)
        before = self._rested(draw(), 1)
        while True:
            whole, after = self._rested(draw(), case.num_tokens), self._rested(draw(), 1)
            yield (whole - (before + after) / 2) / (case.num_tokens - 1)
            before = after

    def _rested(self, prompts: list[list[int]], num_tokens: int) -> float:
        self.rest(REST_S)
        return self._seconds(prompts, num_tokens)

    def _expected_seconds(self, case: Case, prompts: list[list[int]]) -> float:
        """The warm-up, and how long it lets expect the first repetition to be."""
        num_tokens = min(WARM_UP_TOKENS, case.num_tokens)
        first = self._seconds(prompts, 1)
        more = max(0.0, self._seconds(prompts, num_tokens) - first)
        whole = more * (case.num_tokens - 1) / (num_tokens - 1)
        return 3 * (REST_S + first) + whole

    def _seconds(self, prompts: list[list[int]], num_tokens: int, cached_len: int = 0) -> float:
        """Until all are answered; of each prompt `cached_len` tokens must have been cached."""
        # seeds of their own: equal ones would draw alike, and a batch would meet few experts
        params = [
            replace(self.params, max_tokens=num_tokens, seed=self.seed + i)
            for i in range(len(prompts))
        ]
        began = self.clock()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        took = self.clock() - began
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        assert all(output.num_cached_tokens == cached_len for output in outputs)
        return took

    def _work(self, case: Case) -> Work:
        config, itemsize = self.engine.model_config, DTYPE_BYTES[self.engine.config.dtype]
        if case.is_prefill:
            return prefill_work(config, case.batch, case.prompt_len, itemsize, case.cached_len)
        context = mean_context(case.prompt_len, case.num_tokens)
        return decode_work(config, case.batch, context, itemsize)


def _excerpt(case: Case, max_num_batched_tokens: int) -> Excerpt:
    """The steps to trace: of a prefill all, of decoding some in the middle."""
    if case.is_prefill:
        return Excerpt()
    num_prefills = -(-case.batch * case.prompt_len // max_num_batched_tokens)
    num_decodes = max(1, case.num_tokens - num_prefills)  # of the whole batch
    num_steps = min(TRACED_STEPS, max(1, num_decodes // 2))
    return Excerpt((num_decodes - num_steps) // 2, num_steps, case.batch)


def _departures(case: Case, repetitions: int) -> str:
    """How a measurement differs from the definition of its case."""
    defined = next(known for known in CASES if known.name == case.name)
    notes = []
    if case.num_tokens != defined.num_tokens:
        notes.append(f"{case.num_tokens} new tokens instead of {defined.num_tokens}")
    if repetitions != REPETITIONS:
        notes.append(f"{repetitions} of {REPETITIONS} repetitions")
    return "; ".join(notes)


def step_row(result: CaseResult, ceilings: Ceilings) -> dict[str, object]:
    """A result as a flat record: for the table and for the JSON line."""
    case = result.case
    row: dict[str, object] = {"case": case.name}
    if result.times:
        floor = result.work.seconds(ceilings)
        unit = "ms" if case.is_prefill else "ms_per_step"
        row[unit] = 1e3 * result.seconds
        if case.is_prefill:
            row["prompt_tokens_per_s"] = case.batch * case.prompt_len / result.seconds
        row |= {
            "floor_ms": 1e3 * floor,
            "share_of_floor": floor / result.seconds,
            "bound": result.work.bound(ceilings),
            "read_gb": result.work.num_bytes / 1e9,
            "tflop": result.work.flops / 1e12,
            "times_ms": [1e3 * t for t in result.times],
        }
    if result.peak is not None:
        held, most = (num_bytes / GIB for num_bytes in result.peak)
        row |= {"peak_gib": most, "peak_above_held_gib": most - held}
    row |= {"note": result.note} if result.note else {}
    return row | {"trace": result.trace} if result.trace is not None else row
