"""StepPlan down, StepResult up: the whole contract between the mind (scheduler) and the body
(runner), and their byte codec.

Owns the meaning and the bytes of both. Never holds a queue, a tensor or a decision. A plan is a
delta: whatever a rank already knows about a slot is not said again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import NamedTuple, TypeVar

from ernie_engine.engine.columns import ColumnReader, ColumnWriter

NO_LOGPROBS = -1  # SamplingSpec.num_logprobs: none are wanted (0 means: of the sampled token only)
MASK64 = (1 << 64) - 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How a slot's tokens are drawn: SamplingParams with every default filled in.

    `banned_ids` (end-of-sequence and stop ids) cannot be drawn before `min_tokens` tokens exist.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    seed: int = 0  # int64
    min_tokens: int = 0
    num_logprobs: int = NO_LOGPROBS
    num_prompt_logprobs: int = NO_LOGPROBS
    banned_ids: tuple[int, ...] = ()
    bias_ids: tuple[int, ...] = ()
    bias_values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NewSlot:
    """A request's first appearance: its prompt and how to sample, said once."""

    slot: int
    token_ids: Sequence[int]
    spec: SamplingSpec


@dataclass(frozen=True, slots=True)
class SamplingPart:
    """What is drawn from a step. `rows` index the plan's rows.

    `prompt_rows` score prompt tokens: in row `prompt_rows[i]`, `prompt_counts[i]` query tokens
    from the `prompt_offsets[i]`-th on are each asked for the token that follows them.
    """

    rows: Sequence[int] = ()
    prompt_rows: Sequence[int] = ()
    prompt_offsets: Sequence[int] = ()
    prompt_counts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """The graph that a step records instead of running rows: the `index`-th of those there are to
    be, proven by rows that nobody asked for, in slots and blocks that are nobody's."""

    index: int
    slots: Sequence[int]
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RecordingRoom:
    """What a recording needs: slots to be proven well, slots to be proven at all, blocks."""

    num_slots: int
    fewest_slots: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks. Applied in the order of the fields.

    freed, preempted: slots whose request ended, or lost its blocks but keeps its tokens.
    new: requests met for the first time.
    starts: (slot, tokens already computed): the slot begins, or begins again, with an empty block
      table; its cached blocks come among the row's new blocks.
    Then one entry a row, rows of one query token first: slots, num_tokens (query tokens),
    num_new_blocks; new_block_ids lists the rows' new blocks one row after the other.
    With a recording there are no rows.
    """

    step_id: int
    freed: Sequence[int]
    preempted: Sequence[int]
    new: Sequence[NewSlot]
    starts: Sequence[tuple[int, int]]
    slots: Sequence[int]
    num_tokens: Sequence[int]
    num_new_blocks: Sequence[int]
    new_block_ids: Sequence[int]
    sampling: SamplingPart
    recording: Recording | None = None


class TokenLogprobs(NamedTuple):  # one a token: cheaper to make than a frozen dataclass
    """Log-probability and rank (1 = likeliest) of one token, and the likeliest alternatives."""

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew: one entry for each of the plan's sampling rows and prompt rows."""

    step_id: int
    token_ids: Sequence[Sequence[int]]  # 1 to k tokens a row
    logprobs: Sequence[Sequence[TokenLogprobs]]  # a row: one for each token, or none
    prompt_logprobs: Sequence[Sequence[TokenLogprobs]]  # a prompt row: one for each token scored


_SPEC_FIELDS = [f.name for f in fields(SamplingSpec)]
_SPEC_FLOATS, _SPEC_INTS = _SPEC_FIELDS[:6], _SPEC_FIELDS[6:11]


def write_spec(out: ColumnWriter, spec: SamplingSpec) -> None:
    out.floats.extend([getattr(spec, name) for name in _SPEC_FLOATS])
    out.ints.extend([getattr(spec, name) for name in _SPEC_INTS])
    out.int_list(spec.banned_ids)
    out.int_list(spec.bias_ids)
    out.float_list(spec.bias_values)


def read_spec(data: ColumnReader) -> SamplingSpec:
    values = [*data.take_floats(len(_SPEC_FLOATS)), *data.take_ints(len(_SPEC_INTS))]
    lists = tuple(data.int_list()), tuple(data.int_list()), tuple(data.float_list())
    return SamplingSpec(*values, *lists)  # pyright: ignore[reportCallIssue, reportArgumentType]


def encode_plan(plan: StepPlan) -> bytes:
    """The plan's frame; decode_plan is its inverse."""
    out = ColumnWriter(b"plan")
    out.ints.append(plan.step_id)
    out.int_list(plan.freed)
    out.int_list(plan.preempted)
    out.ints.append(len(plan.new))
    for new in plan.new:
        out.ints.append(new.slot)
        out.int_list(new.token_ids)
        write_spec(out, new.spec)
    out.int_list([value for start in plan.starts for value in start])
    for column in (plan.slots, plan.num_tokens, plan.num_new_blocks, plan.new_block_ids):
        out.int_list(column)
    part = plan.sampling
    for column in (part.rows, part.prompt_rows, part.prompt_offsets, part.prompt_counts):
        out.int_list(column)
    write_recording(out, plan.recording)
    return out.done()


def decode_plan(data: bytes) -> StepPlan:
    """Raises ValueError on a frame that is no plan or is cut short."""
    frame = ColumnReader(b"plan", data)
    step_id, freed, preempted = frame.one(), frame.int_list(), frame.int_list()
    new = [NewSlot(frame.one(), frame.int_array(), read_spec(frame)) for _ in range(frame.one())]
    flat = frame.int_list()
    starts = list(zip(flat[::2], flat[1::2], strict=True))
    slots, num_tokens, num_new_blocks, new_block_ids = (frame.int_list() for _ in range(4))
    part = SamplingPart(*(frame.int_list() for _ in range(4)))
    rows = slots, num_tokens, num_new_blocks, new_block_ids
    recording = read_recording(frame)
    frame.end()
    return StepPlan(step_id, freed, preempted, new, starts, *rows, part, recording)


def write_recording(out: ColumnWriter, recording: Recording | None) -> None:
    out.ints.append(recording is not None)
    if recording is not None:
        out.ints.append(recording.index)
        out.int_list(recording.slots)
        out.int_list(recording.block_ids)


def read_recording(data: ColumnReader) -> Recording | None:
    return Recording(data.one(), data.int_list(), data.int_list()) if data.one() else None


def write_logprobs(out: ColumnWriter, rows: Sequence[Sequence[TokenLogprobs]]) -> None:
    out.int_list([len(row) for row in rows])
    tokens = [token for row in rows for token in row]
    if not tokens:  # as in most steps; nothing follows
        return
    out.int_list([token.rank for token in tokens])
    out.int_list([len(token.top_ids) for token in tokens])
    out.int_list([i for token in tokens for i in token.top_ids])
    out.floats.extend([token.logprob for token in tokens])
    out.floats.extend([p for token in tokens for p in token.top_logprobs])


def read_logprobs(data: ColumnReader) -> list[list[TokenLogprobs]]:
    counts = data.int_list()
    if not any(counts):
        return [[] for _ in counts]
    ranks, widths, ids = (data.int_list() for _ in range(3))
    logprobs, values = data.take_floats(len(ranks)), data.take_floats(len(ids))
    tops = zip(split(ids, widths), split(values, widths), strict=True)
    columns = zip(logprobs, ranks, tops, strict=True)
    return split([TokenLogprobs(p, rank, *top) for p, rank, top in columns], counts)


def split(values: Sequence[T], counts: Sequence[int]) -> list[list[T]]:
    """Lists of so many values each, one after the other; ValueError if they are not all."""
    if sum(counts) != len(values):
        raise ValueError(f"a frame counts {sum(counts)} entries and has {len(values)}")
    rest = iter(values)
    return [list(islice(rest, count)) for count in counts]


def encode_result(result: StepResult) -> bytes:
    """The result's frame; decode_result is its inverse."""
    out = ColumnWriter(b"done")
    out.ints.append(result.step_id)
    out.int_list([len(row) for row in result.token_ids])
    out.int_list([token for row in result.token_ids for token in row])
    write_logprobs(out, result.logprobs)
    write_logprobs(out, result.prompt_logprobs)
    return out.done()


def decode_result(data: bytes) -> StepResult:
    """Raises ValueError on a frame that is no result or is cut short."""
    frame = ColumnReader(b"done", data)
    step_id, counts = frame.one(), frame.int_list()
    token_ids = split(frame.int_list(), counts)
    logprobs, prompt_logprobs = read_logprobs(frame), read_logprobs(frame)
    frame.end()
    return StepResult(step_id, token_ids, logprobs, prompt_logprobs)


def derived_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of a request with n > 1; choice 0 keeps the request's own.

    SplitMix64's output function (Steele, Lea, Flood 2014) over (seed, choice), as an int64.
    """
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
