"""StepPlan -> forward pass, eager or replayed -> sampler -> StepResult, on one rank's device.

Owns the device state. Knows no queue and decides nothing: it runs plans in the order given.
launch() and sample() are two calls, so that what a row's sampling waits for never holds the
forward pass back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_engine.engine.plan import (
    NO_LOGPROBS,
    SamplingPart,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from ernie_engine.kernels.registry import Ops
from ernie_engine.model.batch import shape_of
from ernie_engine.model.ernie import Ernie
from ernie_engine.model.forward import Forward, StepOutput
from ernie_engine.model.graphs import NO_GRAPHS, StepGraphs
from ernie_engine.model.host_copies import HostCopies
from ernie_engine.model.kv_cache import KVCache
from ernie_engine.model.promises import Promises
from ernie_engine.model.sampler import LogprobTensors, Sampler
from ernie_engine.model.slots import Slots, to_device
from ernie_engine.model.stage_clock import StageClock
from ernie_engine.parallel.comm import check_equal
from ernie_engine.parallel.pipe import Pipe

PROMPT_LOGITS_CHUNK = 256  # rows of logits held at once while a prompt is scored


@dataclass
class PendingResult:
    """A step's answer on its way from the device; wait() blocks until it is there."""

    step_id: int
    tokens: Tensor  # on the host [R], valid once `ready`
    num_logprobs: Sequence[int]  # a row: how many alternatives, or NO_LOGPROBS
    logprobs: LogprobTensors | None
    prompt: list[tuple[int, list[LogprobTensors]]]  # a prompt row: alternatives, its chunks
    ready: torch.cuda.Event | None = field(repr=False)

    def wait(self) -> StepResult:
        if self.ready is not None:
            self.ready.synchronize()
        rows = [[token] for token in self.tokens.tolist()]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in rows]
        if self.logprobs is not None:
            wanted = [i for i, count in enumerate(self.num_logprobs) if count != NO_LOGPROBS]
            for i, score in zip(wanted, _scores(self.logprobs), strict=True):
                logprobs[i] = [_shorten(score, self.num_logprobs[i])]
        prompt = [
            [_shorten(score, count) for chunk in chunks for score in _scores(chunk)]
            for count, chunks in self.prompt
        ]
        return StepResult(self.step_id, rows, logprobs, prompt)


class ModelRunner:
    """Runs this rank's part of steps for the requests in `state`, over the blocks of `kv`."""

    def __init__(
        self,
        model: Ernie,
        ops: Ops,
        state: Slots,
        kv: KVCache,
        pipe: Pipe,
        max_steps_in_flight: int = 1,
        debug: bool = False,
        graphs: StepGraphs = NO_GRAPHS,
    ):
        self.model, self.ops, self.state, self.kv, self.pipe = model, ops, state, kv, pipe
        self.mesh, self.debug, self.graphs = pipe.mesh, debug, graphs
        self.forward = Forward(model, state, kv)
        self.sampler = Sampler(ops, state)
        self.promises = Promises(pipe, state, max_steps_in_flight)
        self.clock = StageClock(state.device)
        self.copies = HostCopies(state.device)
        self._launched: tuple[StepPlan, StepOutput | None] | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Bring the slots up to the plan and run its forward pass, or record one."""
        if self.state.device.type == "cuda":
            torch.cuda.set_device(self.state.device)  # of this thread, which may be a new one
        self.promises.drop(plan.freed)
        self.state.apply(plan)
        if plan.recording is None:
            self._launched = plan, self._run(plan)
        else:
            self.clock.start()
            self.graphs.record(plan.recording)
            self._launched = plan, None

    def _run(self, plan: StepPlan) -> StepOutput:
        self.promises.keep(plan.slots)
        shape = shape_of(plan, self.state.num_blocks)
        stream = self.pipe.receive_stream(shape.num_tokens)
        self.clock.start()
        graph = self.graphs.find(shape)
        if graph is not None:
            output = graph.replay(plan.slots, plan.num_tokens, stream)
            if not self.mesh.is_last_stage:  # the next replay may come before this is sent
                output = output._replace(hidden=output.hidden.clone())
        else:
            columns = [list(plan.slots), list(plan.num_tokens)]
            slots, counts = to_device(columns, torch.int64, self.state.device)
            output = self.forward(slots, counts, shape, stream)
        self.pipe.send_stream(output.hidden)
        return output

    @torch.inference_mode()
    def sample(self, part: SamplingPart) -> PendingResult | None:
        """Draw from the step just launched and start the copy of the answer to the host; None if
        another rank tells the answer."""
        assert self._launched is not None, "sample() follows launch()"
        plan, output = self._launched
        self._launched = None
        result = None
        if output is None:
            result = self._done(plan.step_id)
        elif self.mesh.is_last_stage:
            result = self._answer(plan, part, output)
        elif self.mesh.is_first_stage and part.rows:
            at = to_device(list(part.rows), torch.int64, self.state.device)
            self.promises.expect([plan.slots[row] for row in part.rows], output.rows.slots[at])
        self.clock.stop()
        return result

    def _done(self, step_id: int) -> PendingResult | None:
        """Of a step that draws nothing."""
        if not self.mesh.is_reporter:
            return None
        tokens = torch.empty(0, dtype=torch.int64)
        return PendingResult(step_id, tokens, (), None, [], self.copies.done())

    def _answer(
        self, plan: StepPlan, part: SamplingPart, output: StepOutput
    ) -> PendingResult | None:
        tokens, logprobs = torch.empty(0, dtype=torch.int64), None
        slot_ids = [plan.slots[row] for row in part.rows]
        wanted = [self.state.specs[slot].num_logprobs for slot in slot_ids]
        if part.rows:
            tokens, logprobs = self._draw(part.rows, slot_ids, wanted, plan.num_tokens, output)
        prompt = [
            self._score_prompt(plan.slots[row], row, offset, count, plan, output)
            for row, offset, count in zip(
                part.prompt_rows, part.prompt_offsets, part.prompt_counts, strict=True
            )
        ]
        if not self.mesh.is_reporter:
            return None
        ready = self.copies.done()
        return PendingResult(plan.step_id, tokens, wanted, logprobs, prompt, ready)

    def _draw(
        self,
        rows: Sequence[int],
        slot_ids: Sequence[int],
        wanted: Sequence[int],
        counts: Sequence[int],
        output: StepOutput,
    ) -> tuple[Tensor, LogprobTensors | None]:
        slots, positions, last, logits = _last_tokens(rows, counts, output)
        if logits is None:
            logits = self.model.logits(last)
        tokens = self.sampler.draw(logits, slot_ids, slots, positions)
        if self.debug:
            check_equal(tokens, self.mesh, f"tokens drawn for slots {slot_ids}")
        self.state.write(slots, positions, tokens)
        self.pipe.send_tokens(tokens)
        asking = [i for i, count in enumerate(wanted) if count != NO_LOGPROBS]
        if not asking:
            return self.copies.fetch(tokens), None
        scored = logits, tokens
        if len(asking) < len(wanted):
            chosen = to_device(asking, torch.int64, self.state.device)
            scored = logits[chosen], tokens[chosen]
        logprobs = self.sampler.logprobs(*scored, max(wanted))
        fetch = self.copies.fetch
        return fetch(tokens), LogprobTensors(*map(fetch, logprobs))

    def _score_prompt(
        self,
        slot: int,
        row: int,
        offset: int,
        count: int,
        plan: StepPlan,
        output: StepOutput,
    ) -> tuple[int, list[LogprobTensors]]:
        """Log-probabilities of the prompt tokens after `count` of the row's query tokens."""
        first = sum(plan.num_tokens[:row]) + offset
        num_top = self.state.specs[slot].num_prompt_logprobs
        chunks = []
        for start in range(first, first + count, PROMPT_LOGITS_CHUNK):
            span = slice(start, min(start + PROMPT_LOGITS_CHUNK, first + count))
            following = self.state.history[slot, output.rows.positions[span] + 1].long()
            logits = self.model.logits(output.hidden[span])
            scores = self.sampler.logprobs(logits, following, num_top)
            chunks.append(LogprobTensors(*map(self.copies.fetch, scores)))
        return num_top, chunks


def _last_tokens(
    rows: Sequence[int], counts: Sequence[int], output: StepOutput
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The slots [R] of some of the step's rows, their next tokens' positions [R], and of their last
    tokens the hidden states [R, H] and the logits [R, V], if there are; `counts` are the tokens of
    every row. The first rows, as long as they have one token each, as when all decode, need no
    index from the host."""
    (slots, row_ends, _, positions), hidden, logits = output
    if list(rows) == list(range(len(rows))) and all(n == 1 for n in counts[: len(rows)]):
        first = slice(len(rows))
        logits = None if logits is None else logits[first]
        return slots[first], positions[first], hidden[first], logits
    at = to_device(list(rows), torch.int64, hidden.device)
    return slots[at], positions[at], hidden[row_ends[at]], None


def _scores(tensors: LogprobTensors) -> list[TokenLogprobs]:
    columns = (column.tolist() for column in tensors)
    return [TokenLogprobs(*values) for values in zip(*columns, strict=True)]


def _shorten(score: TokenLogprobs, num_top: int) -> TokenLogprobs:
    """Rows share one batch of alternatives, as many as the most demanding asked for."""
    if len(score.top_ids) == num_top:
        return score
    ids, logprobs = score.top_ids[:num_top], score.top_logprobs[:num_top]
    return TokenLogprobs(score.logprob, score.rank, ids, logprobs)
