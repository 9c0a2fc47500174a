"""The requests of the API as types: what each field may be.

For reading only; nothing here is touched once a token has been drawn. Numbers are finite; integers
are JSON integers or integral floats, never strings or booleans.
"""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictStr,
    WithJsonSchema,
)

MAX_CHOICES, MAX_PROMPTS, MAX_MESSAGES = 128, 1024, 4096
MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS, MAX_BIASES = 16, 1024, 128, 1024
_INT32, _INT64 = (1 << 31) - 1, (1 << 63) - 1


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integral = BeforeValidator(_integral)
Count = Annotated[int, Strict(), Field(ge=0, le=_INT32), _Integral]
AtLeastOne = Annotated[int, Strict(), Field(ge=1, le=_INT32), _Integral]
TopK = Annotated[int, Strict(), Field(ge=-1, le=_INT32), _Integral]
Seed = Annotated[int, Strict(), Field(ge=-_INT64 - 1, le=_INT64), _Integral]
NumChoices = Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES), _Integral]
TokenId = Annotated[int, Strict(), Field(ge=0, le=_INT32), _Integral]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
TopP = Annotated[Number, Field(gt=0, le=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Factor = Annotated[Number, Field(ge=0.01, le=100)]

_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
# Read by functions of their own, which say better what is wrong than a union of types can.
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {**_IDS, "minItems": 1},
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]
Stops = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOPS,
                },
            ]
        }
    ),
]
Biases = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number"},
            "maxProperties": MAX_BIASES,
        }
    ),
]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
Messages = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "minLength": 1},
                    "content": {
                        "anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]
                    },
                },
                "required": ["role"],
            },
        }
    ),
]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: StrictStr | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class GenerationRequest(_Fields):
    """What both APIs have."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Factor | None = None
    logit_bias: Biases | None = None
    min_tokens: Count | None = None
    stop: Stops | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_IDS)
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    seed: Seed | None = None
    n: NumChoices | None = None
    prompt_logprobs: Count | None = None
    return_token_ids: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})

    prompt: Prompts = None
    echo: StrictBool | None = None
    logprobs: Count | None = None


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: StrictBool | None = None


class TokenizeRequest(_Fields):
    """POST /tokenize: a prompt, or messages as the chat template renders them."""

    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    tools: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=128)


class DetokenizeRequest(_Fields):
    """POST /detokenize"""

    tokens: list[TokenId]
