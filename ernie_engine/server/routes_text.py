"""The tokenizer's routes: /tokenize, /detokenize, /tokenizer_info.

Owns their answers. A special token's text becomes its one id here, as harnesses expect; in the
content of messages it stays text.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from ernie_engine.server.body import parse_object, read_body
from ernie_engine.server.errors import ApiError, bad_request, from_value_error
from ernie_engine.server.fields import read_fields
from ernie_engine.server.front import FrontEnd
from ernie_engine.server.protocol import DetokenizeRequest, TokenizeRequest
from ernie_engine.server.served import ServedModel
from ernie_engine.server.values import read_messages
from ernie_engine.text.tokenizer import Tokenizer


class TextRoutes:
    def __init__(self, front: FrontEnd):
        self._front = front

    async def tokenize(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        body = await read_body(request)
        return JSONResponse(await self._front.in_thread(self._tokenize, body, served))

    async def detokenize(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        body = await read_body(request)
        return JSONResponse(await self._front.in_thread(self._detokenize, body, served))

    async def tokenizer_info(self, request: Request) -> JSONResponse:
        served = self._front.require_model()
        tokenizer = _tokenizer_of(served)
        return JSONResponse(
            {
                "tokenizer_class": "Ernie4_5_Tokenizer",
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "chat_template": served.intake.template.source,
            }
        )

    def _tokenize(self, body: bytes, served: ServedModel) -> dict[str, Any]:
        asked, _ = read_fields(TokenizeRequest, parse_object(body), self._strict)
        self._front.model_name(asked.model)
        tokenizer = _tokenizer_of(served)
        try:
            tokens = self._encode(asked, served)
        except ValueError as error:
            fields = TokenizeRequest.model_fields
            raise from_value_error(error, fields, served.config.max_model_len) from error
        texts = [tokenizer.token_text(t) for t in tokens] if asked.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": served.config.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }

    def _encode(self, asked: TokenizeRequest, served: ServedModel) -> list[int]:
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("prompt: give either a prompt or messages.", "prompt")
        if asked.prompt is not None:
            return served.intake.encode(asked.prompt)
        return served.intake.encode_chat(
            read_messages(asked.messages),
            add_generation_prompt=asked.add_generation_prompt is not False,
            tools=asked.tools,
        )

    def _detokenize(self, body: bytes, served: ServedModel) -> dict[str, Any]:
        asked, _ = read_fields(DetokenizeRequest, parse_object(body), self._strict)
        self._front.model_name(asked.model)
        size = served.limits.vocab_size
        bad = next((i for i, token in enumerate(asked.tokens) if token >= size), None)
        if bad is not None:
            where = f"tokens[{bad}]"
            found = f"{where}: token id {asked.tokens[bad]} is out of vocabulary (0 .. {size - 1})."
            raise bad_request(found, where)
        text = _tokenizer_of(served).decode(asked.tokens, skip_special_tokens=False)
        return {"prompt": text}

    @property
    def _strict(self) -> bool:
        return self._front.settings.server.strict_fields


def _tokenizer_of(served: ServedModel) -> Tokenizer:
    if served.tokenizer is None:
        raise ApiError(501, "This model's folder has no tokenizer.")
    return served.tokenizer
