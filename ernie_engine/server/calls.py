"""What a caller asks for, read and checked: from request types to SamplingParams and prompts.

Owns the checks that need more than one field or the served model. Starts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernie_engine.engine.intake import DEFAULT_MAX_TOKENS, Message
from ernie_engine.engine.request import SamplingParams
from ernie_engine.server.errors import bad_request, from_value_error
from ernie_engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from ernie_engine.server.values import read_biases, read_messages, read_prompts, read_stops


@dataclass(frozen=True)
class ModelLimits:
    """What the served model can be asked for."""

    max_model_len: int
    max_logprobs: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request for answers: prompts, how to sample, what to show of it."""

    is_chat: bool
    model: str  # the name that was asked for
    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[Message] = ()
    add_generation_prompt: bool = True
    params: SamplingParams
    default_max_tokens: int
    echo: bool = False
    hides_answer: bool = False  # max_tokens 0: one token is drawn and not shown
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    return_token_ids: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def num_requests(self) -> int:
        return self.params.n * (1 if self.is_chat else len(self.prompts))


def read_completion(asked: CompletionRequest, model: str, limits: ModelLimits) -> Call:
    """ApiError names the field that is wrong."""
    echo, max_tokens = bool(asked.echo), asked.max_tokens
    if max_tokens == 0 and not echo:
        raise bad_request("max_tokens: 0 only makes sense with echo.", "max_tokens")
    hides_answer = max_tokens == 0
    _check_logprobs("logprobs", asked.logprobs, limits.max_logprobs)
    _check_logprobs("prompt_logprobs", asked.prompt_logprobs, limits.max_logprobs)
    echoed = asked.logprobs if echo else None
    prompt_logprobs = [k for k in (echoed, asked.prompt_logprobs) if k is not None]
    params = _params(
        asked,
        limits,
        max_tokens=1 if hides_answer else max_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=max(prompt_logprobs, default=None),
        **({"ignore_eos": True, "stop": (), "stop_token_ids": ()} if hides_answer else {}),
    )
    return Call(
        is_chat=False,
        prompts=read_prompts(asked.prompt),
        params=params,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        echo=echo,
        hides_answer=hides_answer,
        num_logprobs=asked.logprobs,
        **_presentation(asked, model),
    )


def read_chat(asked: ChatCompletionRequest, model: str, limits: ModelLimits) -> Call:
    """As read_completion; an answer is by default as long as there is room."""
    if asked.top_logprobs and not asked.logprobs:
        raise bad_request("top_logprobs: needs logprobs: true.", "top_logprobs")
    _check_logprobs("top_logprobs", asked.top_logprobs, limits.max_logprobs)
    _check_logprobs("prompt_logprobs", asked.prompt_logprobs, limits.max_logprobs)
    num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    longest = asked.max_completion_tokens
    params = _params(
        asked,
        limits,
        max_tokens=asked.max_tokens if longest is None else longest,
        logprobs=num_logprobs,
        prompt_logprobs=asked.prompt_logprobs,
    )
    return Call(
        is_chat=True,
        messages=read_messages(asked.messages),
        add_generation_prompt=asked.add_generation_prompt is not False,
        params=params,
        default_max_tokens=limits.max_model_len,
        num_logprobs=num_logprobs,
        **_presentation(asked, model),
    )


def _params(asked: GenerationRequest, limits: ModelLimits, **values: Any) -> SamplingParams:
    """SamplingParams from the fields that both APIs have, and `values`."""
    try:
        return SamplingParams(
            **{
                "n": asked.n or 1,
                "temperature": asked.temperature,
                "top_p": asked.top_p,
                "top_k": asked.top_k,
                "min_p": asked.min_p,
                "repetition_penalty": asked.repetition_penalty,
                "presence_penalty": asked.presence_penalty,
                "frequency_penalty": asked.frequency_penalty,
                "logit_bias": read_biases(asked.logit_bias, limits.vocab_size),
                "min_tokens": asked.min_tokens or 0,
                "stop": read_stops(asked.stop),
                "stop_token_ids": tuple(asked.stop_token_ids or ()),
                "ignore_eos": bool(asked.ignore_eos),
                "include_stop_str_in_output": bool(asked.include_stop_str_in_output),
                "skip_special_tokens": asked.skip_special_tokens is not False,
                "seed": None if asked.seed == -1 else asked.seed,
                **values,
            }
        )
    except ValueError as error:  # what needs two fields to be seen
        fields = type(asked).model_fields
        raise from_value_error(error, fields, limits.max_model_len) from error


def _presentation(asked: GenerationRequest, model: str) -> dict[str, Any]:
    stream, options = bool(asked.stream), asked.stream_options
    if options is not None and not stream:
        raise bad_request("stream_options: needs stream: true.", "stream_options")
    if stream and asked.prompt_logprobs:
        raise bad_request("prompt_logprobs: cannot be streamed.", "prompt_logprobs")
    include_usage = options is not None and bool(options.include_usage)
    return {
        "model": model,
        "stream": stream,
        "include_usage": include_usage,
        "continuous_usage": include_usage and bool(options and options.continuous_usage_stats),
        "return_token_ids": bool(asked.return_token_ids),
        "num_prompt_logprobs": asked.prompt_logprobs,
    }


def _check_logprobs(field: str, count: int | None, most: int) -> None:
    if count is not None and count > most:
        raise bad_request(f"{field}: {count} is above the {most} that this server offers.", field)
