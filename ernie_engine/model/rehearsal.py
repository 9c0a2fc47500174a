"""Steps of requests that nobody made: what start-up measures memory with, compiles kernels for and
checks recordings by.

Owns their plans. All rows are requests with one prompt, which read and write the same blocks, as
sharers of a prefix do; so any number of them needs the blocks of one. Leaves all slots free.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ernie_engine.engine.plan import NewSlot, SamplingPart, SamplingSpec, StepPlan
from ernie_engine.engine_config import ResolvedConfig
from ernie_engine.kernels.decode_attention import MAX_GATHERED_TOKENS
from ernie_engine.model.batch import StepShape
from ernie_engine.model.ernie import DecoderLayer, Ernie
from ernie_engine.model.runner import PROMPT_LOGITS_CHUNK, ModelRunner

Row = tuple[int, int]  # tokens computed before, query tokens
# Sizes that stand for all: kernels differ from one bucket of a launch table to the next, and every
# bucket has one of these. A test compares them with the tables.
SIZES = sorted({*range(1, 10), *(s for k in range(4, 18) for s in (2**k, 2**k + 1, 3 * 2**k // 2))})
SHORT_CONTEXT = 64


def made_up_plan(
    rows: Sequence[Row],
    block_size: int,
    num_blocks: int,
    token_ids: Sequence[int] = (0,),
    spec: SamplingSpec | None = None,
    sampling: SamplingPart | None = None,
) -> StepPlan:
    """A step of one new request a row, over the first of `num_blocks` blocks, again and again if
    they do not suffice."""
    table_lens = [-(-(computed + count) // block_size) for computed, count in rows]
    spec = SamplingSpec() if spec is None else spec
    return StepPlan(
        step_id=-1,
        freed=(),
        preempted=(),
        new=[NewSlot(slot, token_ids, spec) for slot in range(len(rows))],
        starts=[(slot, computed) for slot, (computed, _) in enumerate(rows)],
        slots=range(len(rows)),
        num_tokens=[count for _, count in rows],
        num_new_blocks=table_lens,
        new_block_ids=[i % num_blocks for length in table_lens for i in range(length)],
        sampling=SamplingPart() if sampling is None else sampling,
    )


def placed(plan: StepPlan, slots: Sequence[int], block_ids: Sequence[int]) -> StepPlan:
    """A made-up plan with the `i`-th of these slots and blocks where it has i."""
    return replace(
        plan,
        new=[replace(new, slot=slots[new.slot]) for new in plan.new],
        starts=[(slots[slot], computed) for slot, computed in plan.starts],
        slots=[slots[slot] for slot in plan.slots],
        new_block_ids=[block_ids[block] for block in plan.new_block_ids],
    )


def release_plan(plan: StepPlan) -> StepPlan:
    """The end of all requests of a made-up plan."""
    return StepPlan(plan.step_id, plan.slots, (), (), (), (), (), (), (), SamplingPart())


def rehearse(runner: ModelRunner, plan: StepPlan) -> None:
    """Run a made-up plan. With several ranks all run it together."""
    runner.launch(plan)
    runner.sample(plan.sampling)
    runner.promises.drop(plan.slots)
    runner.state.apply(release_plan(plan))


def different_layers(layers: nn.ModuleList) -> nn.ModuleList:
    """Those that ask for every kernel: one of each kind, two in any case, since the first has no
    residual yet."""
    kept: list[DecoderLayer] = []
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        if len(kept) < 2 or all(type(layer.mlp) is not type(other.mlp) for other in kept):
            kept.append(layer)
    return nn.ModuleList(kept)


@contextmanager
def few_layers(model: Ernie) -> Iterator[None]:
    """A model of different_layers() for a while: what it says means nothing, but comes sooner."""
    layers, model.layers = model.layers, different_layers(model.layers)
    try:
        yield
    finally:
        model.layers = layers


def busy_spec(config: ResolvedConfig) -> SamplingSpec:
    """Asks for all that sampling can do."""
    return SamplingSpec(
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        frequency_penalty=0.1,
        num_logprobs=config.max_logprobs,
        num_prompt_logprobs=config.max_logprobs,
    )


def scored(num_rows: int, num_last: int) -> SamplingPart:
    """Every row is drawn from, and of the last one, of `num_last` query tokens, as much of the
    prompt is scored as is at once."""
    count = min(PROMPT_LOGITS_CHUNK, num_last - 1)
    return SamplingPart(range(num_rows), *(([num_rows - 1], [0], [count]) if count else ()))


def largest_plan(config: ResolvedConfig) -> StepPlan:
    """A step with every slot and the whole token budget in use, and rows of full context.

    All rows read the same block 0: what counts is the memory the step takes, not its answer.
    """
    budget, max_len = config.max_num_batched_tokens, config.max_model_len
    num_rows = min(config.max_num_seqs, budget)
    longest = max_len - 1  # the token drawn after it is the last that fits
    num_last = min(budget - num_rows + 1, longest)
    # As many rows of full context as one batch of the decode twin gathers; then short ones.
    num_long = min(num_rows - 1, MAX_GATHERED_TOKENS // longest + 1)
    rows = [(longest - 1, 1)] * num_long + [(0, 1)] * (num_rows - 1 - num_long)
    rows.append((longest - num_last, num_last))
    sampling = scored(num_rows, num_last)
    return made_up_plan(rows, config.block_size, 1, (0,), busy_spec(config), sampling)


def compiling_plans(config: ResolvedConfig, num_blocks: int) -> Iterator[StepPlan]:
    """Steps that ask for every kernel that this engine's requests can ask for: single tokens in
    all numbers, then prompts in all lengths, behind prefixes that are read in one part or more."""
    longest, budget = config.max_model_len - 1, config.max_num_batched_tokens
    busy, drawing, greedy = (
        busy_spec(config),
        SamplingSpec(temperature=1.0),
        SamplingSpec(temperature=0.0),
    )

    def plan(rows: Sequence[Row], spec: SamplingSpec = busy) -> StepPlan:
        sampling = scored(len(rows), rows[-1][1])
        return made_up_plan(rows, config.block_size, num_blocks, (0,), spec, sampling)

    most_rows = min(config.max_num_seqs, budget)
    yield plan([(0, 1)], greedy)
    for size in sizes_up_to(most_rows):
        yield plan([(0, 1)] * size)
        yield plan([(0, 1)] * size, drawing)
    splits = [512 << i for i in range(6)]
    # A table of blocks may end behind the longest context: up to the next of these.
    prefixes = [keys for keys in splits[1:] if keys // 2 < longest]
    for size in sizes_up_to(min(budget, most_rows * longest)):
        yield plan(_rows_of(size, 0, longest))
        # Fewest programs, and so most parts of a context, have the first sizes of a bucket.
        is_first = size >= 2 and (size - 1) & (size - 2) == 0
        if is_first:
            yield from (plan(_rows_of(size, prefix, longest)) for prefix in prefixes)
            short = (keys for keys in splits if keys < min(size, longest))
            short = (keys for keys in short if -(-size // keys) <= most_rows)
            yield from (plan(_rows_of(size, 0, keys)) for keys in short)


def sizes_up_to(most: int) -> list[int]:
    return [*(size for size in SIZES if size < most), most]


def _rows_of(num_tokens: int, prefix: int, longest: int) -> list[Row]:
    """Few rows of so many query tokens together, behind a prefix where there is room for one."""
    rows = []
    while num_tokens > 0:
        count = min(num_tokens, longest)
        rows.append((min(prefix, longest - count), count))
        num_tokens -= count
    return sorted(rows, key=lambda row: row[1] > 1)


def rows_filling(shape: StepShape, longest: int) -> list[Row]:
    """Of a recorded shape: rows of different lengths and, if it can be, one or more of padding."""
    if shape.num_decodes:
        num_rows = max(1, shape.num_rows - 1)
        return [((7 * i + 20) % min(longest, SHORT_CONTEXT), 1) for i in range(num_rows)]
    # Single tokens stand behind the others: each position is written by one row, or by rows that
    # begin with the first. What a token gives depends, in its last bit, on where its context ends.
    most_rows, padding = shape.num_rows - 1, min(3, longest, shape.num_tokens // 4)
    has_room = most_rows > 2 and (most_rows - 2) * (longest - 2) >= shape.num_tokens
    num_single = 2 if has_room else 0
    left, prompts = shape.num_tokens - padding - num_single, []
    while left > 0 and len(prompts) < most_rows - num_single:
        prompts.append((0, min(left, longest - num_single)))
        left -= prompts[-1][1]
    behind = max(count for _, count in prompts)
    rows = [*((behind + i, 1) for i in range(num_single)), *prompts]
    return sorted(rows, key=lambda row: row[1] > 1)


def turned(rows: Sequence[Row]) -> list[Row]:
    """Rows in another order, the last of several tokens with one fewer if it has some: what fits
    where `rows` do, with other numbers."""
    single = [row for row in rows if row[1] == 1]
    longer = [row for row in rows if row[1] > 1]
    if longer and longer[-1][1] > 2:
        computed, count = longer[-1]
        longer[-1] = computed, count - 1
    return [*single[::-1], *longer[::-1]]
