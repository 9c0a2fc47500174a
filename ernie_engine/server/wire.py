"""The frames between the engine process and the front end: their meaning and their bytes.

A frame (framing.py) is its kind and then columns of numbers (engine/columns.py) or, for what is
said once, JSON. Nothing is ever pickled; what is not what it says is a ValueError.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice

from ernie_engine.engine.columns import ColumnReader, ColumnWriter
from ernie_engine.engine.plan import read_logprobs, read_spec, write_logprobs, write_spec
from ernie_engine.engine.request import FinishReason, Request, TokenOutput

SETTINGS, READY = b"conf", b"redy"  # engine -> front end, JSON, once each
STATE, STEP, DRAIN = b"stat", b"step", b"drai"  # engine -> front end
REQUESTS, ABORT = b"reqs", b"abrt"  # front end -> engine

_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "abort")
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class EngineState:
    """How the engine is doing, told several times a second; totals count from the start."""

    seconds_stalled: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_compilations: int = 0
    num_graphs: int = 0


@dataclass(frozen=True, slots=True)
class StepFrame:
    """All that one step brought, and when those that have their first token were started."""

    outputs: Sequence[TokenOutput]
    started_at: Mapping[int, float] = field(default_factory=dict)  # id -> CLOCK_MONOTONIC
    preempted: Mapping[int, int] = field(default_factory=dict)  # id of an ended one -> how often


def encode_drain(seconds: float) -> bytes:
    out = ColumnWriter(DRAIN)
    out.floats.append(seconds)
    return out.done()


def decode_drain(payload: bytes) -> float:
    data = ColumnReader(DRAIN, payload)
    (seconds,) = data.take_floats(1)
    data.end()
    return seconds


def encode_state(state: EngineState) -> bytes:
    out = ColumnWriter(STATE)
    stalled, *counts = astuple(state)
    out.floats.append(stalled)
    out.int_list(counts)
    return out.done()


def decode_state(payload: bytes) -> EngineState:
    data = ColumnReader(STATE, payload)
    state = EngineState(data.take_floats(1)[0], *data.int_list())
    data.end()
    return state


def encode_requests(requests: Sequence[Request]) -> bytes:
    """The choices of one prompt: they share it, their limits and the tokens that end them."""
    first, out = requests[0], ColumnWriter(REQUESTS)
    out.int_list(first.token_ids)
    out.ints.append(first.max_total_tokens)
    out.int_list(sorted(first.eos_ids))
    out.int_list(sorted(first.stop_ids))
    out.ints.append(len(requests))
    for request in requests:
        out.ints.append(request.request_id)
        write_spec(out, request.spec)
    return out.done()


def decode_requests(payload: bytes) -> list[Request]:
    data = ColumnReader(REQUESTS, payload)
    prompt, total = data.int_array(), data.one()
    eos_ids, stop_ids = frozenset(data.int_list()), frozenset(data.int_list())
    requests = [
        Request(data.one(), prompt, read_spec(data), total, eos_ids, stop_ids)
        for _ in range(data.one())
    ]
    data.end()
    return requests


def encode_abort(request_ids: Iterable[int]) -> bytes:
    out = ColumnWriter(ABORT)
    out.int_list(list(request_ids))
    return out.done()


def decode_abort(payload: bytes) -> list[int]:
    data = ColumnReader(ABORT, payload)
    request_ids = data.int_list()
    data.end()
    return request_ids


def encode_step(frame: StepFrame) -> bytes:
    out, outputs = ColumnWriter(STEP), frame.outputs
    out.int_list([o.request_id for o in outputs])
    out.int_list([len(o.token_ids) for o in outputs])
    out.int_list([token for o in outputs for token in o.token_ids])
    out.int_list([_REASONS.index(o.finish_reason) for o in outputs])
    out.int_list([_NO_TOKEN if o.stop_token_id is None else o.stop_token_id for o in outputs])
    out.int_list([o.num_cached_tokens for o in outputs])
    scored = [i for i, o in enumerate(outputs) if o.logprobs or o.prompt_logprobs]
    out.int_list(scored)
    write_logprobs(out, [outputs[i].logprobs for i in scored])
    write_logprobs(out, [outputs[i].prompt_logprobs for i in scored])
    out.int_list(list(frame.started_at))
    out.floats.extend(frame.started_at.values())
    out.int_list(list(frame.preempted))
    out.ints.extend(frame.preempted.values())
    return out.done()


def decode_step(payload: bytes) -> StepFrame:
    data = ColumnReader(STEP, payload)
    ids, counts, flat, reasons, stops, cached = (data.int_list() for _ in range(6))
    tokens = iter(flat)
    scored = data.int_list()
    logprobs = dict(zip(scored, read_logprobs(data), strict=True))
    prompt_logprobs = dict(zip(scored, read_logprobs(data), strict=True))
    columns = zip(ids, counts, reasons, stops, cached, strict=True)
    outputs = [
        TokenOutput(
            request_id,
            list(islice(tokens, count)),
            logprobs.get(i, ()),
            prompt_logprobs.get(i, ()),
            _REASONS[reason],
            None if stop == _NO_TOKEN else stop,
            num_cached,
        )
        for i, (request_id, count, reason, stop, num_cached) in enumerate(columns)
    ]
    started = data.int_list()
    started_at = dict(zip(started, data.take_floats(len(started)), strict=True))
    preempted = data.int_list()
    counted = dict(zip(preempted, data.take_ints(len(preempted)), strict=True))
    data.end()
    return StepFrame(outputs, started_at, counted)
