"""Log-probabilities as the two APIs show them: the cases that a real model seldom brings."""

from ernie_engine.engine.request import Logprob
from ernie_engine.server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from ernie_engine.text.detokenizer import IncrementalDetokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    strips_leading_space = False

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def is_special(self, token: int) -> bool:
        return False


def scores(*tokens: int, sampled: int) -> dict[int, Logprob]:
    """The tokens by rank, best first, the sampled one at the front of the dictionary."""
    ranked = {t: Logprob(-float(r), r, Bytes().token_text(t)) for r, t in enumerate(tokens, 1)}
    return {sampled: ranked[sampled], **ranked}


def test_of_two_tokens_with_one_text_the_likelier_keeps_it():
    """Half characters all show as U+FFFD; the map must still hold the true maximum."""
    found = scores(0xE2, 0x41, 0x82, sampled=0x82)
    part = CompletionLogprobs(2, Bytes()).part([0x82], [found], None)  # type: ignore[arg-type]
    assert part["top_logprobs"] == [{"\ufffd": -1.0, "A": -2.0, "token_id:130": -3.0}]
    assert part["token_logprobs"] == [-3.0] and part["tokens"] == ["\ufffd"]


def test_offsets_of_half_characters_stay_where_the_character_begins():
    text = "a€b"
    tokens = list(text.encode())
    detokenizer = IncrementalDetokenizer(Bytes(), False)
    found = [scores(token, sampled=token) for token in tokens]
    builder = CompletionLogprobs(0, Bytes())  # type: ignore[arg-type]
    first = builder.part(tokens[:2], found[:2], detokenizer)
    rest = builder.part(tokens[2:], found[2:], detokenizer)
    assert first["text_offset"] + rest["text_offset"] == [0, 1, 1, 1, 2]
    assert first["top_logprobs"] == [{"a": -1.0}, {"\ufffd": -1.0}]


def test_chat_entries_join_to_the_text_by_their_bytes():
    tokens = list("€".encode())
    found = [scores(65, token, sampled=token) for token in tokens]
    content = chat_logprobs(tokens, found, 1, Bytes())["content"]  # type: ignore[arg-type]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "€"
    assert all([t["token"] for t in entry["top_logprobs"]] == ["A"] for entry in content)


def test_prompt_scores_are_cut_to_the_count_that_was_asked_for():
    found = scores(7, 8, 9, sampled=9)
    assert prompt_logprobs([None, found], [1, 9], 1) == [
        None,
        {
            "9": {"logprob": -3.0, "rank": 3, "decoded_token": "\t"},
            "7": {"logprob": -1.0, "rank": 1, "decoded_token": "\x07"},
        },
    ]


def test_a_folder_without_tokenizer_has_scores_too():
    part = CompletionLogprobs(1, None).part([5], [scores(4, 5, sampled=5)], None)
    assert part["tokens"] == [""] and part["text_offset"] == [0]
    entry = chat_logprobs([5], [scores(4, 5, sampled=5)], 1, None)["content"][0]
    assert entry["bytes"] == [] and entry["logprob"] == -2.0
