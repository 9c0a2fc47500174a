"""The answers of the API as types: for /openapi.json, and for tests that compare.

Nothing here is built while serving: answers are plain dictionaries, and these say which.
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: int
    reason: NotRequired[str]


class ErrorResponse(TypedDict):
    error: Error


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(TypedDict):
    index: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]


class Message(TypedDict):
    role: Literal["assistant"]
    content: str


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChoice(_Choice):
    message: Message
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class _Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Answer):
    """An event of the stream; the one with the usage has no choices. The last is [DONE]."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage]


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Answer):
    """An event of the stream; the one with the usage has no choices. The last is [DONE]."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Version(TypedDict):
    version: str


class Load(TypedDict):
    server_load: int


class Info(TypedDict):
    version: str
    system_fingerprint: str
    config: dict[str, Any]
    num_kv_blocks: int
    kernels: dict[str, str]
    build: dict[str, str]
