"""Text that arrives in pieces equals text that arrived at once."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_engine.text.detokenizer import IncrementalDetokenizer, StopStrings
from ernie_engine.text.tokenizer import Tokenizer


class Bytes:
    """Ids 0..255 are bytes, 256 is the special token "<s>"."""

    def __init__(self, strips_leading_space: bool = False):
        self.strips_leading_space = strips_leading_space

    def token_bytes(self, token_id: int) -> bytes:
        return b"<s>" if token_id == 256 else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id == 256


TEXT = "aé中😀\u0301\n\ufffd z"


@pytest.mark.parametrize("first", range(len(TEXT.encode()) + 1))
def test_never_half_a_character(first: int):
    data = TEXT.encode()
    for second in range(first, len(data) + 1):
        detokenizer = IncrementalDetokenizer(Bytes(), skip_special_tokens=True)
        parts = [data[:first], data[first:second], data[second:]]
        shown = [detokenizer.push(part) for part in parts]
        assert "".join(shown) == TEXT and detokenizer.finish() == ""
        for end, text in zip(
            (first, second), ("".join(shown[:1]), "".join(shown[:2])), strict=True
        ):
            assert text == data[:end].decode(errors="ignore")


@given(
    ids=st.lists(st.integers(0, 256) | st.sampled_from([256, *TEXT.encode()]), max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    skip=st.booleans(),
    strips=st.booleans(),
)
def test_any_cut_gives_the_same_text(ids: list[int], cuts: list[int], skip: bool, strips: bool):
    detokenizer = IncrementalDetokenizer(Bytes(strips), skip)
    bounds = [0, *sorted(cuts), len(ids)]
    shown = [detokenizer.push(ids[a:b]) for a, b in pairwise(bounds)]
    whole = IncrementalDetokenizer(Bytes(strips), skip)
    assert "".join(shown) + detokenizer.finish() == whole.push(ids) + whole.finish()
    if not strips:
        kept = [i for i in ids if not (skip and i == 256)]
        expected = b"".join(map(Bytes().token_bytes, kept)).decode(errors="replace")
        whole = IncrementalDetokenizer(Bytes(), skip)
        assert whole.push(ids) + whole.finish() == expected


@given(text=st.text(max_size=20))
def test_token_by_token_equals_decode(text: str, thinking: Tokenizer):
    ids = thinking.encode(text + "</think><|im_end|>" + text)
    for skip in (True, False):
        detokenizer = IncrementalDetokenizer(thinking, skip)
        shown = [detokenizer.push([token_id]) for token_id in ids]
        assert "".join(shown) + detokenizer.finish() == thinking.decode(ids, skip)


def test_an_unfinished_character_is_flushed_as_a_replacement():
    detokenizer = IncrementalDetokenizer(Bytes(), skip_special_tokens=False)
    assert detokenizer.push("中".encode()[:2]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.push(b"ok") == "ok"  # nothing is left over
    assert detokenizer.push([0xE4, 256]) == "\ufffd<s>"


def test_the_encoders_own_space_is_taken_off_each_run():
    for skip, expected in ((True, "a  bc "), (False, "a  b<s>c <s>")):
        detokenizer = IncrementalDetokenizer(Bytes(strips_leading_space=True), skip)
        ids = [*b" a  b", 256, *b" c ", 256, *b" "]
        assert "".join(detokenizer.push([i]) for i in ids) == expected


def naive_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(end, stop string) of the match that ends first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def held_back(text: str, stops: Sequence[str]) -> int:
    lengths = range(len(text), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stops)), 0)


letters = st.text(alphabet="ab\n", max_size=14)


@given(
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
    parts=st.lists(letters, max_size=6),
    include=st.booleans(),
)
def test_stop_strings_against_a_search_in_the_whole_text(stops, parts, include):
    finder, shown, text = StopStrings(stops, include), "", ""
    for part in parts:
        text += part
        piece, stop = finder.push(part)
        shown += piece
        match = naive_stop(text, stops)
        if match:
            end, expected = match
            assert stop == expected
            assert shown == text[: end if include else end - len(expected)]
            assert finder.finish() == ""
            return
        assert stop is None
        assert len(shown) == len(text) - (0 if include else held_back(text, stops))
    assert shown + finder.finish() == text


def test_stop_strings_over_token_borders():
    finder = StopStrings(["\nUser:", "END"], include_in_output=False)
    pushed = [finder.push(text) for text in ("hi", "\nUs", "age\n", "User", ": x")]
    assert pushed == [("hi", None), ("", None), ("\nUsage", None), ("", None), ("", "\nUser:")]


def test_overlapping_stop_strings():
    """In "abcd" the beginning of "abcx" is on the way when "bc" is complete."""
    assert StopStrings(["abcx", "bc"], False).push("abcd") == ("a", "bc")
    assert StopStrings(["abcx", "bc"], True).push("abcd") == ("abc", "bc")
    assert StopStrings(["c", "abc"], False).push("abc") == ("", "abc")
    assert StopStrings(["abc", "ab"], False).push("abc") == ("", "ab")


def test_no_stop_strings_hold_nothing_back():
    finder = StopStrings([], include_in_output=False)
    assert finder.push("anything") == ("anything", None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop: a stop string must not be empty"):
        StopStrings(["a", ""], include_in_output=False)


def test_time_is_linear_for_the_worst_text():
    """A backtracking search would need 10^9 steps."""
    finder = StopStrings(["a" * 5000 + "b"], include_in_output=False)
    shown = sum(len(finder.push("a" * 100)[0]) for _ in range(2000))
    assert shown == 200_000 - 5000
