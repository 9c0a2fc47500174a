"""Pieces of an answer -> its events: the choices of chunks, as plain dictionaries.

One event for each token. A whole answer is the fold of its events, so what is true of one
presentation is true of the other. Knows no socket and no request object.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ernie_engine.engine.intake import Job
from ernie_engine.engine.request import Logprobs, Piece
from ernie_engine.server.calls import Call
from ernie_engine.server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from ernie_engine.text.detokenizer import IncrementalDetokenizer
from ernie_engine.text.tokenizer import Tokenizer

Event = dict[str, Any]


class PromptAnswer:
    """The answers of one prompt. `first_index`: the index of its first choice."""

    def __init__(self, call: Call, job: Job, tokenizer: Tokenizer | None, first_index: int):
        self._num_prompt_tokens = len(job.output.prompt_token_ids)
        self._scores: list[Logprobs | None] = []
        self._needs_scores = call.params.prompt_logprobs is not None
        self._early: list[Piece] = []
        kind = ChatChoice if call.is_chat else CompletionChoice
        self._choices = [
            kind(call, job, tokenizer, first_index + choice, self._scores)
            for choice in range(call.params.n)
        ]

    def events(self, piece: Piece) -> Iterator[Event]:
        """What a piece adds. Choices whose events show the prompt's scores wait for them."""
        self._scores.extend(piece.prompt_logprobs or ())
        if piece.token_ids:
            self._early.append(piece)
        if self._needs_scores and len(self._scores) < self._num_prompt_tokens:
            return
        pieces, self._early = self._early, []
        for ready in pieces:
            yield self._choices[ready.index].event(ready)


class CompletionChoice:
    """A choice of /v1/completions."""

    def __init__(
        self,
        call: Call,
        job: Job,
        tokenizer: Tokenizer | None,
        index: int,
        scores: Sequence[Logprobs | None],
    ):
        self._call, self._job, self._tokenizer = call, job, tokenizer
        self._index, self._scores, self._is_first = index, scores, True
        self._detokenizer = None
        self._logprobs = None
        if call.num_logprobs is not None:
            self._logprobs = CompletionLogprobs(call.num_logprobs, tokenizer)
            self._detokenizer = _detokenizer(tokenizer, call.params.skip_special_tokens)

    def event(self, piece: Piece) -> Event:
        hides, echoes = self._call.hides_answer, self._is_first and self._call.echo
        echo = self._echo() if echoes else ""
        details = _details(self._call, self._job, piece, self._is_first, self._scores)
        self._is_first = False
        return {
            "index": self._index,
            "text": echo if hides else echo + piece.text,
            "logprobs": self._logprob_arrays(piece, echoes, hides) if self._logprobs else None,
            "finish_reason": "length" if hides else piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **details,
        }

    def _echo(self) -> str:
        output = self._job.output
        if output.prompt is not None or self._tokenizer is None:
            return output.prompt or ""
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def _logprob_arrays(self, piece: Piece, echoes: bool, hides: bool) -> dict[str, list[Any]]:
        assert self._logprobs is not None
        parts = []
        if echoes:
            whole = _detokenizer(self._tokenizer, skip_special_tokens=False)
            prompt = self._job.output.prompt_token_ids
            parts.append(self._logprobs.part(prompt, self._scores, whole))
        if not hides:
            scores = piece.logprobs or ()
            parts.append(self._logprobs.part(piece.token_ids, scores, self._detokenizer))
        return fold(parts)


class ChatChoice:
    """A choice of /v1/chat/completions."""

    def __init__(
        self,
        call: Call,
        job: Job,
        tokenizer: Tokenizer | None,
        index: int,
        scores: Sequence[Logprobs | None],
    ):
        self._call, self._job, self._tokenizer = call, job, tokenizer
        self._index, self._scores = index, scores
        self._is_first, self._has_role = True, False

    def event(self, piece: Piece) -> Event:
        """The role comes once, with the first text: clients add strings up."""
        delta: dict[str, str] = {"content": piece.text}
        if not self._has_role and (piece.text or piece.finish_reason):
            self._has_role, delta = True, {"role": "assistant", **delta}
        count, logprobs = self._call.num_logprobs, None
        if count is not None:
            scores = piece.logprobs or ()
            logprobs = chat_logprobs(piece.token_ids, scores, count, self._tokenizer)
        details = _details(self._call, self._job, piece, self._is_first, self._scores)
        self._is_first = False
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **details,
        }


def _details(
    call: Call, job: Job, piece: Piece, is_first: bool, scores: Sequence[Logprobs | None]
) -> Event:
    """What few ask for: ids beside text, and what is said of the prompt with the first event."""
    details, prompt = {}, job.output.prompt_token_ids
    if call.return_token_ids:
        details["token_ids"] = [] if call.hides_answer else piece.token_ids
        if is_first:
            details["prompt_token_ids"] = prompt
    if is_first and call.num_prompt_logprobs is not None:
        details["prompt_logprobs"] = prompt_logprobs(scores, prompt, call.num_prompt_logprobs)
    return details


def _detokenizer(
    tokenizer: Tokenizer | None, skip_special_tokens: bool
) -> IncrementalDetokenizer | None:
    return None if tokenizer is None else IncrementalDetokenizer(tokenizer, skip_special_tokens)


def fold(values: Iterable[Mapping[str, Any]]) -> Any:
    """One dictionary of many: texts and lists follow each other, of other values the last counts.

    Takes time in proportion to what it makes.
    """
    by_key: dict[str, list[Any]] = {}
    for value in values:
        for key, item in value.items():
            if item is not None:
                by_key.setdefault(key, []).append(item)
            else:
                by_key.setdefault(key, [])
    return {key: _joined(items) for key, items in by_key.items()}


def _joined(items: list[Any]) -> Any:
    first = items[0] if items else None
    if isinstance(first, str):
        return "".join(items)
    if isinstance(first, list):
        return list(chain.from_iterable(items))
    if isinstance(first, Mapping):
        return fold(items)
    return items[-1] if items else None
