"""A runner without a model, that keeps the books a real one keeps and checks every read.

The "K/V" of a token is the whole prefix that ends with it (as a tuple). A row may only be computed
if the blocks of its table hold, position by position, exactly its own prefix; so a block that is
shared wrongly, reused too early or never written is caught at the step where it would be read.
"""

from collections.abc import Callable, Sequence

from ernie_engine.engine.plan import Recording, StepPlan, StepResult, TokenLogprobs

NextToken = Callable[[Sequence[int]], int]


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int, next_token: NextToken):
        self.block_size, self.next_token = block_size, next_token
        self.cache: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)
        self.history: dict[int, list[int]] = {}
        self.prompt_lens: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self.num_prefilled = 0
        self.recorded: list[int] = []

    def run(self, plan: StepPlan) -> StepResult:
        self._apply(plan)
        if plan.recording is not None:
            self._record(plan.recording)
        rows = list(zip(plan.slots, plan.num_tokens, strict=True))
        for slot, num_tokens in rows:
            self._write(slot, num_tokens)
        firsts = [self._read_back(slot, num_tokens) for slot, num_tokens in rows]
        part = plan.sampling
        scores = [
            self._score(plan.slots[row], firsts[row] + offset, count)
            for row, offset, count in zip(
                part.prompt_rows, part.prompt_offsets, part.prompt_counts, strict=True
            )
        ]
        tokens = [[self._draw(plan.slots[row])] for row in part.rows]
        return StepResult(plan.step_id, tokens, [[] for _ in tokens], scores)

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed:
            del self.history[slot], self.computed[slot], self.blocks[slot]
        for slot in plan.preempted:
            self.blocks[slot] = []
        for new in plan.new:
            assert new.slot not in self.history, "a slot in use is given away"
            self.history[new.slot] = list(new.token_ids)
            self.prompt_lens[new.slot] = len(new.token_ids)
        for slot, computed in plan.starts:
            self.computed[slot], self.blocks[slot] = computed, []
        assert len(set(plan.slots)) == len(plan.slots), "a slot has two rows"
        singles = [n == 1 for n in plan.num_tokens]
        assert singles == sorted(singles, reverse=True), "single tokens come first"
        ids = iter(plan.new_block_ids)
        for slot, count in zip(plan.slots, plan.num_new_blocks, strict=True):
            self.blocks[slot] += [next(ids) for _ in range(count)]
        assert next(ids, None) is None

    def _record(self, recording: Recording) -> None:
        assert not self.history.keys() & set(recording.slots), "a slot in use is recorded with"
        assert recording.index not in self.recorded
        self.recorded.append(recording.index)
        for block in recording.block_ids:
            first = block * self.block_size
            self.cache[first : first + self.block_size] = [None] * self.block_size

    def _at(self, slot: int, position: int) -> int:
        block = self.blocks[slot][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def _write(self, slot: int, num_tokens: int) -> None:
        first = self.computed[slot]
        assert num_tokens >= 1 and first + num_tokens <= len(self.history[slot])
        for position in range(first, first + num_tokens):
            self.cache[self._at(slot, position)] = tuple(self.history[slot][: position + 1])
        self.computed[slot] += num_tokens
        self.num_prefilled += num_tokens

    def _read_back(self, slot: int, num_tokens: int) -> int:
        for position in range(self.computed[slot]):
            expected = tuple(self.history[slot][: position + 1])
            assert self.cache[self._at(slot, position)] == expected, "a row reads foreign K/V"
        return self.computed[slot] - num_tokens  # its first query token

    def _score(self, slot: int, first: int, count: int) -> list[TokenLogprobs]:
        assert count > 0 and first + count <= min(self.computed[slot], self.prompt_lens[slot] - 1)
        tokens = self.history[slot][first + 1 : first + count + 1]
        return [TokenLogprobs(-1.0, token, [], []) for token in tokens]

    def _draw(self, slot: int) -> int:
        assert self.computed[slot] == len(self.history[slot]), "drawn before all is computed"
        token = self.next_token(self.history[slot])
        self.history[slot].append(token)
        return token
