"""A prompt and its SamplingParams -> checked requests with every default filled in.

Owns what is asked of the model and whether it can be had: a ValueError here names the field, and
nothing has been submitted yet. Never talks to the loop.
"""

import itertools
import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_engine.engine.assembler import ChoiceAssembler
from ernie_engine.engine.plan import NO_LOGPROBS, SamplingSpec, derived_seed
from ernie_engine.engine.request import (
    CompletionOutput,
    Request,
    RequestOutput,
    SamplingParams,
)
from ernie_engine.text.generation import GenerationDefaults
from ernie_engine.text.templates import ChatTemplate
from ernie_engine.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MIN_TEMPERATURE = 0.01  # below it logits / temperature leave fp32's range
Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True)
class Job:
    """One prompt ready to run: a request and an assembler for each of its choices."""

    output: RequestOutput  # still empty; to be filled with pieces
    requests: list[Request]
    assemblers: list[ChoiceAssembler]


@dataclass(frozen=True)
class Intake:
    """Turns what callers say into jobs for one loaded model."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    longest_token: int  # bytes, so at least its characters
    tokenizer: Tokenizer | None
    template: ChatTemplate
    defaults: GenerationDefaults
    eos_ids: frozenset[int]
    ids: "itertools.count[int]"

    def job(
        self, prompt: Prompt, params: SamplingParams, default_max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> Job:
        """A text or token-id prompt to continue."""
        text = prompt if isinstance(prompt, str) else None
        return self._job(self.encode(prompt), text, params, default_max_tokens)

    def chat_job(
        self, messages: Sequence[Message], params: SamplingParams, **template_options: Any
    ) -> Job:
        """A conversation to answer, by default as long as there is room."""
        return self.job(self.encode_chat(messages, **template_options), params, self.max_model_len)

    def encode_chat(self, messages: Sequence[Message], **template_options: Any) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("messages need a tokenizer, and the checkpoint folder has none")
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError("messages must be a list of {role, content} objects")
        self._check_text(sum(len(str(message.get("content"))) for message in messages))
        return self.template.encode(messages, self.tokenizer, **template_options)

    def encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence):
                raise ValueError(f"prompt must be a text or token ids, not {prompt!r:.200}")
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(
                "a text prompt needs a tokenizer, and the checkpoint folder has none: "
                "give token ids"
            )
        self._check_text(len(prompt))
        return self.tokenizer.encode(prompt)

    def _check_text(self, num_chars: int) -> None:
        """Refuse what cannot fit however it is cut into tokens, before the work of cutting it."""
        most = self.max_model_len * self.longest_token
        if num_chars > most:
            raise PromptTooLongError(
                f"prompt has {num_chars} characters; max_model_len={self.max_model_len} tokens "
                f"hold at most {most}"
            )

    def _job(
        self, prompt: list[int], text: str | None, params: SamplingParams, default_max: int
    ) -> Job:
        ids = self._checked(prompt, params)
        max_tokens = _first(params.max_tokens, self.defaults.max_new_tokens, default_max)
        if params.min_tokens > max_tokens:
            raise ValueError(f"min_tokens={params.min_tokens} is above max_tokens={max_tokens}")
        total = min(len(prompt) + max_tokens, self.max_model_len)
        eos_ids = frozenset() if params.ignore_eos else self.eos_ids
        stop_ids = frozenset(params.stop_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        requests, assemblers = [], []
        for choice in range(params.n):
            spec = self._spec(params, derived_seed(seed, choice), eos_ids | stop_ids, choice)
            requests.append(Request(next(self.ids), ids, spec, total, eos_ids, stop_ids))
            assemblers.append(self._assembler(params, prompt, choice))
        outputs = [CompletionOutput(choice) for choice in range(params.n)]
        output = RequestOutput(requests[0].request_id, text, prompt, outputs)
        return Job(output, requests, assemblers)

    def _spec(
        self, params: SamplingParams, seed: int, banned: frozenset[int], choice: int
    ) -> SamplingSpec:
        defaults = self.defaults
        prompt_logprobs = params.prompt_logprobs if choice == 0 else None

        def value(name: str, usual: float) -> float:
            """The caller's value, else the checkpoint's, else the usual one."""
            return _first(getattr(params, name), getattr(defaults, name), usual)

        temperature = value("temperature", 1.0)
        return SamplingSpec(
            temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0,
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=value("presence_penalty", 0.0),
            frequency_penalty=value("frequency_penalty", 0.0),
            top_k=max(0, _first(params.top_k, defaults.top_k, 0)),
            seed=seed,
            min_tokens=params.min_tokens,
            num_logprobs=_first(params.logprobs, NO_LOGPROBS),
            num_prompt_logprobs=_first(prompt_logprobs, NO_LOGPROBS),
            banned_ids=tuple(sorted(banned)) if params.min_tokens else (),
            bias_ids=tuple(params.logit_bias),
            bias_values=tuple(max(-100.0, min(100.0, b)) for b in params.logit_bias.values()),
        )

    def _assembler(
        self, params: SamplingParams, prompt: Sequence[int], choice: int
    ) -> ChoiceAssembler:
        return ChoiceAssembler(
            choice,
            prompt,
            self.tokenizer,
            stop=tuple(params.stop),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            wants_logprobs=params.logprobs is not None,
            wants_prompt_logprobs=params.prompt_logprobs is not None and choice == 0,
        )

    def _checked(self, prompt: Sequence[int], params: SamplingParams) -> "array[int]":
        """The prompt in one piece, if it can be answered as `params` say."""
        if not prompt:
            raise ValueError("prompt must be provided and non-empty")
        prompt_ids = self._token_ids("prompt", prompt)
        for field, ids in params.token_ids().items():
            self._token_ids(field, ids)
        if len(prompt) >= self.max_model_len:
            raise PromptTooLongError(
                f"prompt has {len(prompt)} tokens; with max_model_len={self.max_model_len} "
                f"at most {self.max_model_len - 1} leave room for an answer"
            )
        for field in ("logprobs", "prompt_logprobs"):
            most = min(self.max_logprobs, self.vocab_size)
            if (getattr(params, field) or 0) > most:
                raise ValueError(f"{field}={getattr(params, field)} is above max_logprobs={most}")
        if params.stop and self.tokenizer is None:
            raise ValueError(
                "stop strings need a tokenizer, and the checkpoint folder has none: "
                "use stop_token_ids"
            )
        return prompt_ids

    def _token_ids(self, field: str, ids: Sequence[int]) -> "array[int]":
        """All at once, as a long prompt asks for; one by one only to tell what is wrong."""
        packed = _packed(ids)
        if packed is not None and _are_within(packed, self.vocab_size):
            return packed
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"{field} must hold token ids (integers), not {token!r}")
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{field}: token id {token} is out of vocabulary (0 .. {self.vocab_size - 1})"
                )
        return array("q", ids)  # a kind of integers of the caller's own


def _packed(ids: Sequence[int]) -> "array[int] | None":
    """Plain integers of 64 bits as what they are kept in; None if one of them is not that."""
    try:
        return array("q", ids) if set(map(type, ids)) <= {int} else None
    except OverflowError:
        return None


def _are_within(ids: "array[int]", vocab_size: int) -> bool:
    values = np.asarray(ids)
    return not len(values) or bool(values.min() >= 0 and values.max() < vocab_size)


def _first(*values):
    """The first that is not None: the caller's value, the checkpoint's, the usual default."""
    return next(value for value in values if value is not None)
