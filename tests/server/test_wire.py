"""Frames survive the way there and back; damaged ones are refused; the link keeps its promises."""

import asyncio
import io
import queue
import socket
import struct
import threading
import time

import pytest

from ernie_engine import framing
from ernie_engine.engine.loop import EngineDeadError
from ernie_engine.engine.plan import SamplingSpec, TokenLogprobs
from ernie_engine.engine.request import Request, TokenOutput
from ernie_engine.server import wire
from ernie_engine.server.link import MAX_STEPS, Link

SPEC = SamplingSpec(0.5, 0.9, 0.1, 1.1, 0.2, 0.3, 40, -5, 3, 2, 1, (1, 2), (7,), (-1.5,))
SCORES = [TokenLogprobs(-0.25, 2, [9, 8], [-0.1, -0.25])]
OUTPUTS = [
    TokenOutput(3, [5]),
    TokenOutput(4, [6, 7], SCORES * 2, (), "stop", 7, 16),
    TokenOutput(5, (), (), SCORES * 3),
    TokenOutput(1 << 40, [0], (), (), "length", 0),
    TokenOutput(6, (), (), (), "abort"),
]


def as_lists(output: TokenOutput) -> tuple:
    scores = list(output.logprobs), list(output.prompt_logprobs)
    return output.request_id, list(output.token_ids), *scores, output.finish_reason, *(
        output.stop_token_id, output.num_cached_tokens
    )  # fmt: skip


def test_steps_survive():
    frame = wire.StepFrame(OUTPUTS, {3: 1.5, 4: 2.25}, {4: 2})
    found = wire.decode_step(wire.encode_step(frame))
    assert [as_lists(o) for o in found.outputs] == [as_lists(o) for o in OUTPUTS]
    assert (found.started_at, found.preempted) == (frame.started_at, frame.preempted)
    assert wire.decode_step(wire.encode_step(wire.StepFrame([]))).outputs == []


def test_requests_survive():
    ids, stops = frozenset({1, 2}), frozenset({9})
    requests = [Request(i, [5, 6, 7], SPEC, 99, ids, stops) for i in (10, 11)]
    found = wire.decode_requests(wire.encode_requests(requests))
    for a, b in zip(requests, found, strict=True):
        assert (a.request_id, a.token_ids, a.spec) == (b.request_id, b.token_ids, b.spec)
        assert (a.max_total_tokens, a.eos_ids, a.stop_ids) == (b.max_total_tokens, ids, stops)
        assert b.num_prompt_tokens == 3
    assert found[0].token_ids is not found[1].token_ids


def test_the_rest_survives():
    state = wire.EngineState(1.5, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert wire.decode_state(wire.encode_state(state)) == state
    assert wire.decode_abort(wire.encode_abort([3, 1])) == [3, 1]
    assert wire.decode_drain(wire.encode_drain(0.5)) == 0.5
    assert framing.decode_json(framing.encode_json(wire.SETTINGS, {"a": ["é"]})) == {"a": ["é"]}


FRAMES = [
    (wire.decode_step, wire.encode_step(wire.StepFrame(OUTPUTS, {3: 1.5}, {4: 2}))),
    (wire.decode_requests, wire.encode_requests([Request(1, [5, 6], SPEC, 9)])),
    (wire.decode_state, wire.encode_state(wire.EngineState(1.5))),
    (wire.decode_abort, wire.encode_abort([3, 1])),
    (wire.decode_drain, wire.encode_drain(0.5)),
]


def longer(payload: bytes) -> bytes:
    """The same frame with one more integer, that nobody reads."""
    kind, num_ints, num_floats = struct.unpack_from("<4sII", payload)
    middle = 12 + 8 * num_ints
    head = struct.pack("<4sII", kind, num_ints + 1, num_floats)
    return head + payload[12:middle] + bytes(8) + payload[middle:]


@pytest.mark.parametrize("index", range(len(FRAMES)))
def test_damaged_frames_are_refused(index):
    decode, whole = FRAMES[index]
    decode(whole)
    for other in {decode for decode, _ in FRAMES} - {decode}:
        with pytest.raises(ValueError):
            other(whole)
    for damaged in [longer(whole), *(whole[:cut] for cut in range(len(whole)))]:
        with pytest.raises(ValueError):
            decode(damaged)


def test_lengths_are_checked_before_anything_is_read():
    for length in (0, 3, framing.MAX_FRAME_BYTES + 1):
        file = io.BytesIO(length.to_bytes(4, "little") + b"x" * 10)
        with pytest.raises(ValueError, match="bytes"):
            framing.read_frame(file)


def test_frames_end_with_the_stream():
    data = framing.framed(b"abcd") + framing.framed(b"efghi")
    for cut in range(len(data)):
        file = io.BytesIO(data[:cut])
        found = [framing.read_frame(file) for _ in range(3)]
        whole = (cut >= 8) + (cut >= 17)
        assert found == [b"abcd", b"efghi"][:whole] + [None] * (3 - whole)

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(data[:-1])
        reader.feed_eof()
        return [await framing.read_frame_async(reader) for _ in range(2)]

    assert asyncio.run(read()) == [b"abcd", None]


class FakeLoop:
    def __init__(self) -> None:
        self.submitted: queue.Queue = queue.Queue()
        self.aborted: queue.Queue = queue.Queue()

    def submit(self, requests, sink):
        self.submitted.put((requests, sink))

    def abort(self, request_ids):
        self.aborted.put(list(request_ids))


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ended, loop = threading.Event(), FakeLoop()
    link = Link(ours, ended.set)
    link.start_reading(loop)
    theirs.settimeout(10)
    yield link, loop, theirs, ended
    theirs.close()
    link.close()


def test_the_link_passes_requests_down_and_steps_up(pair):
    link, loop, theirs, ended = pair
    request = Request(7, [1, 2], SPEC, 9)
    theirs.sendall(framing.framed(wire.encode_requests([request])))
    theirs.sendall(framing.framed(wire.encode_abort([7, 8])))
    (submitted,), sink = loop.submitted.get(timeout=10)
    assert submitted.request_id == 7 and sink is link
    assert loop.aborted.get(timeout=10) == [7, 8]
    submitted.started_at, submitted.num_preemptions = 12.5, 3
    link.put([TokenOutput(7, [5])])
    link.put([TokenOutput(7, [6], finish_reason="length")])
    with theirs.makefile("rb") as file:
        first, second = (wire.decode_step(framing.read_frame(file)) for _ in range(2))
    assert (first.started_at, first.preempted) == ({7: 12.5}, {})
    assert (second.started_at, second.preempted) == ({}, {7: 3})
    assert not ended.is_set() and not link._requests and not link._unstarted


def test_a_front_end_that_lags_holds_the_loop_back_and_its_death_frees_it(pair):
    link, _, theirs, ended = pair
    puts = []

    def put_for_ever():
        for i in range(50_000):
            link.put([TokenOutput(-1, [5] * 1000)])
            puts.append(i)

    thread = threading.Thread(target=put_for_ever, daemon=True)
    thread.start()
    time.sleep(0.5)
    num_puts = len(puts)
    time.sleep(0.2)
    assert (
        MAX_STEPS <= num_puts == len(puts) < MAX_STEPS + 200
    )  # what the socket holds, and no more
    assert not link.try_send(wire.encode_state(wire.EngineState()))
    theirs.close()
    assert ended.wait(10)
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("data", [framing.framed(b"nope1234"), b"\xff\xff\xff\xff", b""])
def test_nonsense_and_the_end_are_noticed(pair, data):
    _, _, theirs, ended = pair
    theirs.sendall(data)
    if not data:
        theirs.close()
    assert ended.wait(10)


def test_the_loops_death_is_noticed(pair):
    link, _, _, ended = pair
    link.put(EngineDeadError("x"))
    assert ended.is_set()
