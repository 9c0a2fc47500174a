"""The framing of streamed answers, cut anywhere."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_engine.bench.sse import ChunkedBody, EventStream


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
PLACES = st.lists(st.integers(0, 1000), max_size=12)


@given(CHUNKS, PLACES)
def test_chunked_bodies(chunks, places):
    framed = b"".join(b"%X;ext=1\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    decoder = ChunkedBody()
    assert b"".join(map(decoder.feed, cut(framed, places))) == b"".join(chunks)
    assert decoder.ended


@given(CHUNKS, PLACES)
def test_a_body_that_was_not_finished_has_not_ended(chunks, places):
    framed = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks)
    decoder = ChunkedBody()
    for data in cut(framed, places):
        decoder.feed(data)
    assert not decoder.ended


@pytest.mark.parametrize("data", [b"xyz\r\nabc", b"\r\nabc", b"a" * 5000])
def test_what_is_not_chunked_is_refused(data):
    with pytest.raises(ValueError):
        ChunkedBody().feed(data)


STREAM = (
    b": hello\n\ndata: one\n\nevent: x\ndata:two\r\n\r\n"
    b"id: 1\n\ndata: a\ndata:  b\n\ndata: [DONE]\n\n"
)


@given(PLACES)
def test_events_come_out_whole_however_they_are_cut(places):
    stream = EventStream()
    events = [event for data in cut(STREAM, places) for event in stream.feed(data)]
    assert events == [b"one", b"two", b"a\n b", b"[DONE]"]


def test_an_event_is_told_as_soon_as_its_blank_line_is_there():
    stream = EventStream()
    assert stream.feed(b"data: x\n") == []
    assert stream.feed(b"\n") == [b"x"]
