"""Log-probabilities as the two APIs show them.

Owns the shapes, the text offsets and the rule for two tokens of one text. Never rounds a value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_engine.engine.request import Logprob, Logprobs
from ernie_engine.text.detokenizer import IncrementalDetokenizer
from ernie_engine.text.tokenizer import Tokenizer

MINUS_INFINITY = -9999.0  # JSON knows no infinity


def value_of(logprob: Logprob) -> float:
    return max(logprob.logprob, MINUS_INFINITY)


def likeliest(scores: Logprobs, count: int) -> list[tuple[int, Logprob]]:
    """The `count` likeliest tokens, best first."""
    ranked = sorted(scores.items(), key=lambda item: item[1].rank)
    return [(token, logprob) for token, logprob in ranked if logprob.rank <= count]


def prompt_logprobs(
    scores: Sequence[Logprobs | None], tokens: Sequence[int], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """For each prompt token {id: {logprob, rank, decoded_token}}; null for the first."""
    return [
        None if score is None else _shown(score, token, count)
        for token, score in zip(tokens, scores, strict=True)
    ]


def _shown(scores: Logprobs, token: int, count: int) -> dict[str, dict[str, Any]]:
    return {
        str(other): {
            "logprob": value_of(logprob),
            "rank": logprob.rank,
            "decoded_token": logprob.decoded_token,
        }
        for other, logprob in scores.items()
        if other == token or logprob.rank <= count
    }


def chat_logprobs(
    tokens: Sequence[int],
    scores: Sequence[Logprobs],
    count: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """{content: an entry for each token, with the `count` likeliest at its place}"""

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        data = b"" if tokenizer is None else tokenizer.token_bytes(token)
        return {
            "token": logprob.decoded_token,
            "logprob": value_of(logprob),
            "bytes": list(data),
        }

    content = [
        {
            **entry(token, score[token]),
            "top_logprobs": [entry(*other) for other in likeliest(score, count)],
        }
        for token, score in zip(tokens, scores, strict=True)
    ]
    return {"content": content}


class CompletionLogprobs:
    """Builds the arrays of one choice, part by part; offsets go on from part to part."""

    def __init__(self, count: int, tokenizer: Tokenizer | None):
        self._count, self._tokenizer, self._offset = count, tokenizer, 0

    def part(
        self,
        tokens: Sequence[int],
        scores: Sequence[Logprobs | None],
        detokenizer: IncrementalDetokenizer | None,
    ) -> dict[str, list[Any]]:
        """{tokens, token_logprobs, top_logprobs, text_offset}: an entry each for each token.

        An offset is where the token's text begins in the text of all tokens so far, whatever a
        stop string holds back.
        """
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(detokenizer.push([token])) if detokenizer else 0
        pairs = list(zip(tokens, scores, strict=True))
        return {
            "tokens": [self._text(token) for token in tokens],
            "token_logprobs": [score and value_of(score[token]) for token, score in pairs],
            "top_logprobs": [score and self._by_text(token, score) for token, score in pairs],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token)

    def _by_text(self, token: int, scores: Logprobs) -> Mapping[str, float]:
        """Where two tokens have one text, the likelier keeps it; the other is "token_id:N"."""
        shown: dict[str, float] = {}
        for other, logprob in sorted(scores.items(), key=lambda item: item[1].rank):
            if other == token or logprob.rank <= self._count:
                text = logprob.decoded_token
                shown[f"token_id:{other}" if text in shown else text] = value_of(logprob)
        return shown
