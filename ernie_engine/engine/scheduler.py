"""Which requests compute which tokens in the next step, and what a finished step means for them.

Owns the waiting and running requests, their slots and blocks. One rule schedules everything:
each step lets a request's computed tokens catch up with its known and promised ones, under a
token budget, first come first served. No clock, no random number, no tensor, no text.

With pipeline stages a step takes one cohort: its even share of the requests, those that ran
longest ago; so as many steps are under way as there are stages, and none waits for a token.

Graphs are recorded by steps too: all that is left of them while there is no request, and one
after each step of requests while there are some.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ernie_engine.engine.block_pool import BlockPool, PrefixHash
from ernie_engine.engine.plan import (
    NewSlot,
    Recording,
    RecordingRoom,
    SamplingPart,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from ernie_engine.engine.request import FinishReason, Request, TokenOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the engine can hold; names as in EngineConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    num_stages: int = 1  # of the pipeline


@dataclass(slots=True)
class _Row:
    request: Request
    first: int  # position of its first query token
    num_tokens: int
    new_block_ids: list[int]
    starts: bool  # the slot begins, or begins again, at `first`


@dataclass(slots=True)
class _Draft:
    """The step being put together: its rows, what is left of the token budget and for how many
    more requests there is room."""

    budget: int
    room: int
    rows: list[_Row] = field(default_factory=list)
    new: list[NewSlot] = field(default_factory=list)


@dataclass(slots=True)
class _InFlight:
    """What a launched step will answer, and to whom."""

    step_id: int
    sampled: list[Request]
    scored: list[Request]


@dataclass(slots=True)
class Counters:
    """Totals since the start, for logs and metrics."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class Scheduler:
    """schedule() -> StepPlan, commit(plan, result) -> outputs; several steps may be in flight."""

    def __init__(
        self,
        limits: Limits,
        pool: BlockPool,
        digest_key: bytes,
        recordings: Sequence[RecordingRoom] = (),
    ):
        """`recordings`: what each graph that is still to be recorded needs, in their order."""
        self.limits, self.pool, self.digest_key = limits, pool, digest_key
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counters = Counters()
        self._free_slots = list(range(limits.max_num_seqs))  # a heap: low slots first
        self._freed: list[int] = []  # slots to name in the next plan, as are:
        self._preempted: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._next_step_id = 0
        for room in recordings:  # else the loop would try for ever
            assert room.fewest_slots <= limits.max_num_seqs and room.num_blocks <= pool.num_blocks
        self._recordings, self._has_just_recorded = recordings, False
        self._to_record = list(range(len(recordings)))

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def has_recordings(self) -> bool:
        """Whether there are graphs that no step has recorded yet."""
        return bool(self._to_record)

    def add(self, request: Request) -> None:
        """Queue a new request. Its prompt must fit the pool and, unchunked, a step."""
        self.waiting.append(request)

    def abort(self, request: Request) -> TokenOutput | None:
        """End a request wherever it is; None if it had already ended."""
        if request.finished:
            return None
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)
        return TokenOutput(request.request_id, finish_reason="abort")

    # --- planning ---

    def schedule(self) -> StepPlan | None:
        """The next step, or None if no request can move before a step in flight is committed."""
        if self.has_recordings and (plan := self._record()) is not None:
            return plan
        draft = _Draft(self.limits.max_num_batched_tokens, self._cohort_size())
        num_preempted = len(self._preempted)
        self._continue_running(draft)
        if len(self._preempted) == num_preempted:  # else blocks are short
            self._admit_waiting(draft)
        return self._launch(draft) if draft.rows else None

    def _record(self) -> StepPlan | None:
        """A recording, unless it is the turn of requests or they leave no room for any.

        Its slots and blocks are free again at once: steps run in order. What the blocks held of a
        prefix is forgotten.
        """
        is_due = not (self._has_just_recorded and self.has_requests)
        index = next(filter(self._has_room, self._to_record), None) if is_due else None
        self._has_just_recorded = index is not None
        if index is None:
            return None
        self._to_record.remove(index)
        room = self._recordings[index]
        block_ids = self.pool.take((), room.num_blocks)
        assert block_ids is not None, "there is room"
        self.pool.release(block_ids)
        recording = Recording(index, self._free_slots[: room.num_slots], block_ids)
        return replace(self._launch(_Draft(0, 0)), recording=recording)

    def _has_room(self, index: int) -> bool:
        room = self._recordings[index]
        has_slots = room.fewest_slots <= len(self._free_slots)
        return has_slots and room.num_blocks <= self.pool.num_free

    def _cohort_size(self) -> int:
        """How many requests a step may move: an even share, so that each stage has work."""
        num_requests = min(len(self.running) + len(self.waiting), self.limits.max_num_seqs)
        return -(-num_requests // self.limits.num_stages)

    def _can_move(self, request: Request) -> bool:
        """Whether its last token is known, or drawn by the time its step reaches the first
        stage: as many steps were launched since as there are stages."""
        was_drawn = self._next_step_id - request.sampled_by >= self.limits.num_stages
        return request.num_promised == 0 or was_drawn

    def _continue_running(self, draft: _Draft) -> None:
        for request in self._in_turn():
            if draft.budget == 0 or draft.room == 0:
                return
            num_tokens = min(request.num_pending, draft.budget)
            was_preempted = not request.block_ids  # for one before it
            if num_tokens > 0 and not was_preempted and self._can_move(request):
                self._grow(request, num_tokens, draft)

    def _in_turn(self) -> list[Request]:
        """The running ones, oldest first; with several stages, first those that ran longest ago."""
        if self.limits.num_stages == 1:
            return self.running[:]
        return sorted(self.running, key=lambda request: request.moved_by)

    def _grow(self, request: Request, num_tokens: int, draft: _Draft) -> None:
        """Add a row for a running request, taking blocks from younger ones if need be.

        If older ones hold too much it keeps its own blocks and waits. The oldest always fits, for
        the pool holds at least one request of full length.
        """
        num_new = self._blocks_for(request.num_computed + num_tokens) - len(request.block_ids)
        while (blocks := self.pool.take((), num_new)) is None:
            victim = self._youngest_after(request)
            if victim is None:
                return
            self.running.remove(victim)
            self._preempt(victim)
        self._add_row(draft, request, num_tokens, blocks, starts=False)

    def _youngest_after(self, request: Request) -> Request | None:
        """The youngest running one that is younger and has no row in the coming step."""
        for other in reversed(self.running):
            if other is request:
                return None
            if other.moved_by != self._next_step_id:
                return other
        raise AssertionError("a running request is among the running ones")

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it keeps its slot and tokens and recomputes them later."""
        self._release_blocks(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._preempted.append(request.slot)
        self.waiting.appendleft(request)

    def _admit_waiting(self, draft: _Draft) -> None:
        while self.waiting and draft.budget > 0 and draft.room > 0:
            request = self.waiting[0]
            if request.num_pending == 0 or (request.slot < 0 and not self._free_slots):
                return
            if not self._can_move(request):
                return
            hits = self._cached_prefix(request)
            num_cached = len(hits) * self.limits.block_size
            num_pending = request.num_tokens - num_cached
            num_tokens = min(num_pending, draft.budget)
            if num_tokens < num_pending and not self.limits.enable_chunked_prefill:
                return
            # All of it must fit now, or the request would be preempted while it is being read.
            num_whole = self._blocks_for(request.num_tokens) - len(hits)
            if self.pool.num_needed(hits, num_whole) > self.pool.num_free:
                return
            num_new = self._blocks_for(num_cached + num_tokens) - len(hits)
            blocks = self.pool.take(hits, num_new)
            assert blocks is not None, "what fits whole fits in part"
            self.running.append(self.waiting.popleft())
            self._start(request, num_cached, len(hits), draft)
            self._add_row(draft, request, num_tokens, blocks, starts=True)

    def _start(self, request: Request, num_cached: int, num_hits: int, draft: _Draft) -> None:
        request.num_computed, request.num_published = num_cached, num_hits
        if request.slot >= 0:  # resumed: the ranks still have its tokens
            return
        request.slot = heapq.heappop(self._free_slots)
        request.num_cached_tokens = num_cached
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        self.counters.num_cached_tokens += num_cached
        draft.new.append(NewSlot(request.slot, request.token_ids[:], request.spec))

    def _add_row(
        self, draft: _Draft, request: Request, num_tokens: int, blocks: list[int], starts: bool
    ) -> None:
        draft.rows.append(_Row(request, request.num_computed, num_tokens, blocks, starts))
        draft.budget -= num_tokens
        draft.room -= 1
        request.moved_by = self._next_step_id
        request.block_ids.extend(blocks)
        request.num_computed += num_tokens
        # At once: a step writes all K/V before it reads any, so the next row can share already.
        self._publish(request)

    def _launch(self, draft: _Draft) -> StepPlan:
        """Make the draft final: promise its tokens, write the plan."""
        draft.rows.sort(key=lambda row: row.num_tokens > 1)  # stable: single tokens first
        step_id, self._next_step_id = self._next_step_id, self._next_step_id + 1
        freed, self._freed = self._freed, []
        preempted, self._preempted = self._preempted, []
        return StepPlan(
            step_id=step_id,
            freed=freed,
            preempted=preempted,
            new=draft.new,
            starts=[(row.request.slot, row.first) for row in draft.rows if row.starts],
            slots=[row.request.slot for row in draft.rows],
            num_tokens=[row.num_tokens for row in draft.rows],
            num_new_blocks=[len(row.new_block_ids) for row in draft.rows],
            new_block_ids=[block for row in draft.rows for block in row.new_block_ids],
            sampling=self._sampling_part(step_id, draft.rows),
        )

    def _sampling_part(self, step_id: int, rows: Sequence[_Row]) -> SamplingPart:
        sampled, scored, offsets, counts = [], [], [], []
        for index, row in enumerate(rows):
            request = row.request
            num_new_scores = self._num_new_scores(request)
            if num_new_scores > 0:
                scored.append(index)
                offsets.append(request.num_prompt_scored - row.first)
                counts.append(num_new_scores)
                request.num_prompt_scored += num_new_scores
            if request.num_computed == request.num_tokens:
                sampled.append(index)
                request.num_promised += 1
                request.sampled_by = step_id
        answering = [rows[i].request for i in sampled], [rows[i].request for i in scored]
        self._in_flight.append(_InFlight(step_id, *answering))
        return SamplingPart(sampled, scored, offsets, counts)

    def _num_new_scores(self, request: Request) -> int:
        """Prompt tokens that the computed ones can now score and that no step has scored yet."""
        if not request.wants_prompt_logprobs:
            return 0
        within_prompt = min(request.num_computed, request.num_prompt_tokens - 1)
        return within_prompt - request.num_prompt_scored

    # --- committing ---

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take in the oldest step's result. What came after a request's end is dropped."""
        entry = self._in_flight.popleft()
        if not entry.step_id == plan.step_id == result.step_id:
            steps = f"{entry.step_id}, {plan.step_id}, {result.step_id}"
            raise RuntimeError(f"steps out of order (expected, planned, done): {steps}")
        outputs = [
            TokenOutput(request.request_id, prompt_logprobs=scores)
            for request, scores in zip(entry.scored, result.prompt_logprobs, strict=True)
            if not request.finished
        ]
        for request, token_ids, logprobs in zip(
            entry.sampled, result.token_ids, result.logprobs, strict=True
        ):
            request.num_promised -= 1
            if not request.finished:
                outputs.append(self._answer(request, token_ids, logprobs))
        return outputs

    def _answer(
        self, request: Request, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> TokenOutput:
        finish_reason, kept = None, 0
        while kept < len(token_ids) and finish_reason is None:
            request.token_ids.append(token_ids[kept])
            finish_reason = _finish_reason(request)
            kept += 1
        self._publish(request)
        if finish_reason is not None:
            (self.running if request in self.running else self.waiting).remove(request)
            self._release(request)
        last = request.token_ids[-1]
        stopped_by = last if finish_reason == "stop" and last not in request.eos_ids else None
        return TokenOutput(
            request.request_id,
            token_ids[:kept],
            logprobs[:kept],
            (),
            finish_reason,
            stopped_by,
            request.num_cached_tokens,
        )

    # --- blocks ---

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _cached_prefix(self, request: Request) -> list[int]:
        """The blocks it can share, leaving at least one token to compute. Prompt tokens that
        must be scored are computed, whatever is cached."""
        if not self.limits.enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        most = (request.num_tokens - 1) // self.limits.block_size
        return self.pool.match(self._digests_of(request)[:most])

    def _digests_of(self, request: Request) -> list[bytes]:
        """Of its full blocks of known tokens."""
        if request.prefix is None:
            request.prefix = PrefixHash(self.limits.block_size, self.digest_key)
        request.prefix.extend(request.token_ids)
        return request.prefix.digests

    def _publish(self, request: Request) -> None:
        """Offer the blocks that are full of known and computed tokens for sharing."""
        if not self.limits.enable_prefix_caching:
            return
        num_known = min(request.num_computed, len(request.token_ids))
        num_full = num_known // self.limits.block_size
        if num_full <= request.num_published:
            return
        digests = self._digests_of(request)
        for i in range(request.num_published, num_full):
            self.pool.publish(request.block_ids[i], digests[i])
        request.num_published = num_full

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_published = 0

    def _release(self, request: Request) -> None:
        """End a request: its blocks and slot are free at once, steps run in order."""
        request.finished = True
        self._release_blocks(request)
        if request.slot >= 0:
            heapq.heappush(self._free_slots, request.slot)
            self._freed.append(request.slot)
            if request.slot in self._preempted:
                self._preempted.remove(request.slot)


def _finish_reason(request: Request) -> FinishReason | None:
    last = request.token_ids[-1]
    ends = last in request.eos_ids or last in request.stop_ids
    if ends and request.num_answered >= request.spec.min_tokens:
        return "stop"
    return "length" if len(request.token_ids) >= request.max_total_tokens else None
