"""Which fields of a request are read, and what happens to the others: three classes.

Known, changing the answer and not offered: 400, if a value asks for something. Harmless: accepted,
without effect. Unknown: accepted and named in a response header, or 400 with --strict-fields.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ernie_engine.server.errors import bad_request, from_validation, shorten

MAX_NAMED = 20  # unknown fields that are named in a header or an error
_NAME_CHARS = 40
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9_.-]")

# field -> values that ask for nothing; null never does. A field that an API reads is not looked up.
NOT_OFFERED: Mapping[str, Sequence[Any]] = {
    **dict.fromkeys(["suffix", "chat_template", "cache_salt", "request_id", "prompt_embeds"], ()),
    **dict.fromkeys(["guided_json", "guided_regex", "guided_choice", "guided_grammar"], ()),
    **dict.fromkeys(["guided_decoding_backend", "guided_whitespace_pattern"], ()),
    **dict.fromkeys(["structured_outputs", "structural_tag", "allowed_token_ids"], ()),
    **dict.fromkeys(["tools", "tool_choice", "function_call", "reasoning_effort"], ()),
    **dict.fromkeys(["truncate_prompt_tokens", "truncation_side", "audio", "prediction"], ()),
    **dict.fromkeys(["web_search_options", "verbosity", "max_completion_tokens"], ()),
    **dict.fromkeys(["echo", "use_beam_search", "early_stopping"], (False,)),
    **dict.fromkeys(["continue_final_message", "return_tokens_as_token_ids"], (False,)),
    **dict.fromkeys(["chat_template_kwargs", "vllm_xargs", "kv_transfer_params"], ({},)),
    **dict.fromkeys(["mm_processor_kwargs", "media_io_kwargs"], ({},)),
    **dict.fromkeys(["documents", "bad_words", "functions"], ([],)),
    **dict.fromkeys(["best_of", "length_penalty", "stream_interval"], (1,)),
    **dict.fromkeys(["priority", "top_logprobs"], (0,)),
    **dict.fromkeys(["include_reasoning", "add_generation_prompt"], (True,)),
    "thinking_token_budget": (-1,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
HARMLESS = frozenset(
    {
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "spaces_between_special_tokens"),
        "add_special_tokens",  # ERNIE's tokenizer adds none
    }
)

Model = TypeVar("Model", bound=BaseModel)


def read_fields(model: type[Model], data: Mapping[str, Any], strict: bool) -> tuple[Model, str]:
    """The fields of `data` in their types, and the names of unknown ones for a header ("": none).

    An explicit null is as good as absence. ApiError names what is wrong or cannot be had.
    """
    given = {name: value for name, value in data.items() if value is not None}
    others = [name for name in given if name not in model.model_fields]
    for name in others:
        if name in NOT_OFFERED and not _asks_nothing(name, given[name]):
            raise bad_request(f"{name}: this server does not offer it for this call.", name)
    unknown = [name for name in others if name not in NOT_OFFERED and name not in HARMLESS]
    if unknown and strict:
        raise bad_request(f"Unknown fields: {_listed(unknown)}.", shorten(unknown[0], _NAME_CHARS))
    try:
        return model.model_validate(given), _listed(unknown)
    except ValidationError as error:
        raise from_validation(error) from error


def _asks_nothing(name: str, value: Any) -> bool:
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in NOT_OFFERED[name]
    )


def _listed(names: Sequence[str]) -> str:
    """For a header or an error: printable and short, whatever a client put there."""
    shown = [_UNPRINTABLE.sub("?", shorten(name, _NAME_CHARS)) for name in names[:MAX_NAMED]]
    return ", ".join(shown) + (", ..." if len(names) > MAX_NAMED else "")
