"""Token outputs to pieces: what is held back, what a stop cuts off, what the end brings."""

import pytest

from ernie_engine.engine.assembler import ChoiceAssembler
from ernie_engine.engine.plan import TokenLogprobs
from ernie_engine.engine.request import Logprob, Piece, TokenOutput

HALF, REST = 128, 129  # the two bytes of "é", a token each


class Letters:
    """A token is its ASCII character, or half of "é"."""

    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return {HALF: b"\xc3", REST: b"\xa9"}.get(token_id) or bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return False


def ids(text: str) -> list[int]:
    return [ord(char) for char in text]


def assembler(prompt=(), **options) -> ChoiceAssembler:
    return ChoiceAssembler(0, prompt, Letters(), **options)  # pyright: ignore[reportArgumentType]


def output(tokens, finish_reason=None, **fields) -> TokenOutput:
    return TokenOutput(7, tokens, finish_reason=finish_reason, **fields)


def push_each(choice: ChoiceAssembler, text: str) -> list[Piece]:
    return [choice.push(output([token])) for token in ids(text)]


def test_text_that_may_begin_a_stop_string_is_held_back():
    choice = assembler(stop=["bcd"])
    assert [piece.text for piece in push_each(choice, "abcb")] == ["a", "", "", "bc"]
    assert not choice.ended
    piece = push_each(choice, "cd")[-1]
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("", "stop", "bcd")
    assert choice.ended


@pytest.mark.parametrize("include", [False, True])
def test_tokens_after_a_stop_string_appear_nowhere(include):
    choice = assembler(stop=["b"], include_stop=include, wants_logprobs=True)
    scores = [TokenLogprobs(-1.0, 1, [], [])] * 3
    piece = choice.push(output(ids("abc"), logprobs=scores))
    assert piece.text == ("ab" if include else "a")
    assert piece.token_ids == ids("ab") and [*map(list, piece.logprobs)] == [[97], [98]]
    assert (piece.finish_reason, piece.stop_reason) == ("stop", "b") and choice.ended


def test_a_stop_string_wins_over_the_length_and_over_a_stop_token_behind_it():
    for reason, stop_token in (("length", None), ("stop", ord("c"))):
        choice = assembler(stop=["b"])
        piece = choice.push(output(ids("xbc"), reason, stop_token_id=stop_token))
        assert (piece.text, piece.finish_reason, piece.stop_reason) == ("x", "stop", "b")
        assert piece.token_ids == ids("xb")


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_a_stop_string_ends_nothing_within_min_tokens(min_tokens):
    choice = assembler(stop=["b"], min_tokens=min_tokens)
    pieces = push_each(choice, "bbbb"[: min_tokens + 1])
    assert [p.finish_reason for p in pieces] == [None] * min_tokens + ["stop"]
    assert "".join(p.text for p in pieces) == "b" * min_tokens


def test_min_tokens_counts_each_token_of_an_output():
    choice = assembler(stop=["b"], min_tokens=2)
    piece = choice.push(output(ids("bbab")))
    assert (piece.text, piece.token_ids, choice.ended) == ("bba", ids("bbab"), True)


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_itself_is_text_only_if_asked_for(include):
    choice = assembler(include_stop=include)
    piece = choice.push(output(ids("abz"), "stop", stop_token_id=ord("z")))
    assert piece.text == ("abz" if include else "ab")
    assert piece.token_ids == ids("abz") and piece.stop_reason == ord("z") and choice.ended


def test_the_last_token_is_text_when_the_length_ends_the_answer():
    choice = assembler()
    assert choice.push(output(ids("ab"), "length")).text == "ab"


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_the_end_brings_what_was_held_back(reason):
    choice = assembler(stop=["abc"])
    assert "".join(piece.text for piece in push_each(choice, "xab")) == "x"
    piece = choice.push(output([], reason))
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("ab", reason, None)


def test_half_a_character_waits_for_the_rest_or_the_end():
    choice = assembler()
    assert choice.push(output([HALF])).text == ""
    assert choice.push(output([REST])).text == "é"
    assert choice.push(output([ord("a"), HALF], "length")).text == "a\ufffd"


def test_half_a_character_at_the_end_stands_behind_what_was_held_back():
    choice = assembler(stop=["ab"])
    assert choice.push(output([ord("a"), HALF])).text == ""
    assert choice.push(output([], "length")).text == "a\ufffd"


def test_after_a_stop_string_nothing_is_flushed():
    choice = assembler(stop=["a"])
    assert choice.push(output([ord("a"), HALF], "length")).text == ""
    many = assembler(stop=["xy", "b"])
    assert "".join(piece.text for piece in push_each(many, "axb")) == "ax"


def test_without_a_tokenizer_all_text_is_empty():
    choice = ChoiceAssembler(1, [5], None, wants_logprobs=True)
    score = TokenLogprobs(-0.5, 1, [9], [-0.5])
    piece = choice.push(output([9], "length", logprobs=[score], num_cached_tokens=3))
    assert (piece.text, piece.token_ids, piece.index) == ("", [9], 1)
    assert piece.logprobs == [{9: Logprob(-0.5, 1, "")}] and piece.num_cached_tokens == 3


def test_a_token_keeps_its_own_score_and_the_alternatives_are_ranked():
    choice = assembler(wants_logprobs=True)
    score = TokenLogprobs(-2.0, 2, ids("xay"), [-1.0, -2.0, -3.0])
    far = TokenLogprobs(-9.0, 30, ids("xy"), [-1.0, -3.0])
    piece = choice.push(output(ids("ab"), logprobs=[score, far]))
    first, second = piece.logprobs
    assert list(first) == ids("axy") and first[ord("a")] == Logprob(-2.0, 2, "a")
    assert [first[t].rank for t in ids("xay")] == [1, 2, 3]
    assert second == {
        ord("b"): Logprob(-9.0, 30, "b"),
        ord("x"): Logprob(-1.0, 1, "x"),
        ord("y"): Logprob(-3.0, 2, "y"),
    }
    assert assembler().push(output(ids("a"), logprobs=[score])).logprobs is None


def test_prompt_scores_continue_where_the_last_output_ended():
    choice = assembler(ids("abcd"), wants_prompt_logprobs=True)
    scores = [TokenLogprobs(-float(i), i, [], []) for i in (1, 2, 3)]
    first = choice.push(output([], prompt_logprobs=scores[:2]))
    assert first.prompt_logprobs[0] is None
    assert [list(found) for found in first.prompt_logprobs[1:]] == [[98], [99]]
    second = choice.push(output(ids("x"), prompt_logprobs=scores[2:]))
    assert second.prompt_logprobs == [{ord("d"): Logprob(-3.0, 3, "d")}]
    assert choice.push(output(ids("y"))).prompt_logprobs == []


def test_a_prompt_of_one_token_has_one_score_and_it_is_none():
    choice = assembler(ids("a"), wants_prompt_logprobs=True)
    assert choice.push(output(ids("x"))).prompt_logprobs == [None]
    assert choice.push(output(ids("y"))).prompt_logprobs == []
    aborted = assembler(ids("ab"), wants_prompt_logprobs=True)
    assert aborted.push(output([], "abort")).prompt_logprobs == []
    assert assembler(ids("a")).push(output(ids("x"))).prompt_logprobs is None
