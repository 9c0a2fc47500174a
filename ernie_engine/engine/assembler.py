"""Token outputs -> pieces of text: detokenization, stop strings, decoded log-probabilities.

Owns the text state of the choices of one prompt. Runs in the caller's thread, so that no step
waits for text. Never ends a request itself: it says that a stop string was met.
"""

from collections.abc import Sequence

from ernie_engine.engine.plan import TokenLogprobs
from ernie_engine.engine.request import FinishReason, Logprob, Logprobs, Piece, TokenOutput
from ernie_engine.text.detokenizer import IncrementalDetokenizer, StopStrings
from ernie_engine.text.tokenizer import Tokenizer


class ChoiceAssembler:
    """The text of one choice, output by output. Without a tokenizer all text is empty."""

    def __init__(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        wants_prompt_logprobs: bool = False,
    ):
        self.index, self.tokenizer = index, tokenizer
        self.include_stop, self.min_tokens = include_stop, min_tokens
        self.wants_logprobs, self.wants_prompt_logprobs = wants_logprobs, wants_prompt_logprobs
        self.ended = False
        self._prompt, self._num_scored, self._num_tokens = prompt_token_ids, 0, 0
        self._detokenizer = tokenizer and IncrementalDetokenizer(tokenizer, skip_special_tokens)
        self._stop_strings = StopStrings(stop, include_stop) if stop else None

    def push(self, output: TokenOutput) -> Piece:
        """The piece that an output adds. `ended` is set when the choice has its last one."""
        texts, stopped_by, used = [], None, 0
        for i, token in enumerate(output.token_ids):
            ends_by_token = output.finish_reason == "stop" and i == len(output.token_ids) - 1
            text, stopped_by = self._text(token, silent=ends_by_token and not self.include_stop)
            texts.append(text)
            used += 1
            if stopped_by is not None:
                break  # tokens drawn after the match appear nowhere
        reason: FinishReason | None = output.finish_reason if stopped_by is None else "stop"
        if reason is not None:
            self.ended = True
            texts.append(self._flush() if stopped_by is None else "")
        return Piece(
            index=self.index,
            text="".join(texts),
            token_ids=list(output.token_ids[:used]),
            logprobs=self._logprobs(output, used),
            prompt_logprobs=self._prompt_logprobs(output),
            finish_reason=reason,
            stop_reason=output.stop_token_id if stopped_by is None else stopped_by,
            num_cached_tokens=output.num_cached_tokens,
        )

    def _text(self, token: int, silent: bool) -> tuple[str, str | None]:
        """What may be shown after one more token, and the stop string that it completed."""
        self._num_tokens += 1
        if self._detokenizer is None or silent:
            return "", None
        text = self._detokenizer.push([token])
        if self._stop_strings is None or self._num_tokens <= self.min_tokens:
            return text, None
        return self._stop_strings.push(text)

    def _flush(self) -> str:
        """What was held back; the end of a half character may still complete nothing."""
        if self._detokenizer is None:
            return ""
        rest = self._detokenizer.finish()
        if self._stop_strings is None:
            return rest
        shown, _ = self._stop_strings.push(rest)
        return shown + self._stop_strings.finish()

    def _logprobs(self, output: TokenOutput, used: int) -> list[Logprobs] | None:
        if not self.wants_logprobs:
            return None
        pairs = zip(output.token_ids[:used], output.logprobs[:used], strict=True)
        return [self._decode(token, score) for token, score in pairs]

    def _prompt_logprobs(self, output: TokenOutput) -> list[Logprobs | None] | None:
        """The scores of the next prompt tokens; the first token follows nothing and has None."""
        if not self.wants_prompt_logprobs:
            return None
        first = self._num_scored == 0 and (output.prompt_logprobs or output.token_ids)
        scores: list[Logprobs | None] = [None] if first else []
        self._num_scored += len(scores)
        for score in output.prompt_logprobs:
            scores.append(self._decode(self._prompt[self._num_scored], score))
            self._num_scored += 1
        return scores

    def _decode(self, token: int, score: TokenLogprobs) -> Logprobs:
        found = {token: self._logprob(token, score.logprob, score.rank)}
        for rank, (other, logprob) in enumerate(
            zip(score.top_ids, score.top_logprobs, strict=True), start=1
        ):
            found.setdefault(other, self._logprob(other, logprob, rank))
        return found

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        text = "" if self.tokenizer is None else self.tokenizer.token_text(token)
        return Logprob(logprob, rank, text)
