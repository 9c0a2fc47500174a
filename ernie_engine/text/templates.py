"""Chat messages to prompt tokens, by the Jinja template of a checkpoint or one of ERNIE's own.

Owns the rule that message content is text: what looks like a special token in it never becomes
one. What a template would silently drop is refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ernie_engine.text.files import read_json
from ernie_engine.text.messages import Message, normalize_messages
from ernie_engine.text.sandbox import compile_template
from ernie_engine.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]

_THINK_TAGS = ("<think>", "</think>")
_MAX_DEPTH = 64  # of nested JSON in messages and tools
_NONCHARACTERS = [  # code points that Unicode never gives a meaning
    *map(chr, range(0xFDD0, 0xFDF0)),
    *(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)),
]
_PROBE = "probe-7b1f"  # a text to look for in what a template renders
_QUESTION = {"role": "user", "content": "?"}
_PROBE_FUNCTION = {
    "type": "function",
    "function": {"name": _PROBE, "parameters": {}, "arguments": {}},
}


def load_chat_template(folder: Path, tokenizer: Tokenizer | None) -> "ChatTemplate":
    """The template in `folder` (chat_template.jinja, else tokenizer_config.json), else a built-in.

    The built-in one is chosen by the tokens in the vocabulary. If none fits, the template that
    is returned refuses to be used. ValueError, naming the file, if the folder's own is broken.
    """
    where, source = _own_source(folder)
    if source is None:
        source = _built_in_for(tokenizer)
    try:
        return ChatTemplate(source, tokenizer.names if tokenizer else {})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def built_in_template(name: str) -> str:
    """The source of a template of ERNIE-4.5: "pt" or "thinking"."""
    return (resources.files("ernie_engine.text") / f"{name}.jinja").read_text(encoding="utf-8")


def _own_source(folder: Path) -> tuple[str, str | None]:
    """(where it stands, the template's source or None)."""
    path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
    source = (read_json(config_path) or {}).get("chat_template")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{config_path}: chat_template: expected a string")
    return f"{config_path}: chat_template", source


def _built_in_for(tokenizer: Tokenizer | None) -> str | None:
    def known(*tokens: str) -> bool:
        return tokenizer is not None and all(tokenizer.token_id(t) is not None for t in tokens)

    if known("<|im_start|>", "<think>"):  # first: such a vocabulary has the PT tokens as well
        return built_in_template("thinking")
    return built_in_template("pt") if known("<|begin_of_sentence|>") else None


class ChatTemplate:
    """One template, compiled. Immutable, so it may be used by several threads at once."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None):
        """`special_tokens`: variables of the template such as cls_token. ValueError on bad Jinja.

        With source None every use is an error that says what is missing.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._render_variables = None if source is None else compile_template(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt as text. ValueError if the messages or the template are at fault."""
        messages = normalize_messages(messages)
        self._refuse_what_would_be_dropped(messages, tools)
        return self._render(messages, tools, add_generation_prompt, template_kwargs)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """The prompt as tokens; only the template's own text can become special tokens.

        Before rendering, special tokens in anything of the caller's are broken by a character
        that occurs nowhere else; it is taken out again when the result has been cut. Only the
        think tags of an assistant stay whole: a template may look for them to drop reasoning.
        """
        messages = normalize_messages(messages)
        self._refuse_what_would_be_dropped(messages, tools)
        mark = self._unused_character([messages, tools, template_kwargs])

        def shield(value: Any) -> Any:
            return _map_strings(value, lambda text: tokenizer.shield(text, mark))

        shielded = [
            {**shield(message), **_assistant_content(message, tokenizer, mark)}
            for message in messages
        ]
        text = self._render(shielded, shield(tools), add_generation_prompt, shield(template_kwargs))
        ids: list[int] = []
        for part in tokenizer.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(tokenizer.encode(part.replace(mark, ""), parse_special=False))
        return ids

    def _unused_character(self, data: object) -> str:
        try:
            text = json.dumps(data, ensure_ascii=False) + (self.source or "")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and tools must be plain JSON: {error}") from error
        for character in _NONCHARACTERS:
            if character not in text:
                return character
        raise ValueError("messages hold every Unicode noncharacter; remove one of them")

    def _refuse_what_would_be_dropped(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> None:
        """Asks the template itself, with tiny chats, whether such things show up at all."""
        roles: dict[str, int] = {}
        for index, message in enumerate(messages):
            roles.setdefault(message["role"], index)
        for role, index in roles.items():
            if role not in ("system", "user", "assistant"):
                chat = [_QUESTION, {"role": role, "content": _PROBE}]
                self._require(f"messages[{index}].role: {role!r}", chat)
        calling = next((i for i, message in enumerate(messages) if "tool_calls" in message), None)
        if calling is not None:
            call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_FUNCTION]}
            self._require(f"messages[{calling}].tool_calls", [_QUESTION, call])
        if tools:
            self._require("tools", [_QUESTION], [_PROBE_FUNCTION])

    def _require(self, what: str, chat: Sequence[Message], tools: Tools | None = None) -> None:
        try:
            shown = _PROBE in self._render(chat, tools, True, {})
        except ValueError:  # it has an opinion of its own: it will say so when it is used
            return
        if not shown:
            raise ValueError(f"{what}: this model's chat template has no place for it")

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        if self._render_variables is None:
            raise ValueError(
                "this model has no chat template: put a chat_template.jinja into its folder, or "
                "send a plain prompt"
            )
        return self._render_variables(
            {
                **self._special_tokens,
                **template_kwargs,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def _assistant_content(message: Message, tokenizer: Tokenizer, mark: str) -> dict[str, str]:
    if message["role"] != "assistant":
        return {}
    return {"content": tokenizer.shield(message["content"], mark, keep=_THINK_TAGS)}


def _map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """`value`, plain JSON, with `change` applied to each string in it, keys included."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages and tools may be nested at most {_MAX_DEPTH} deep")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _map_strings(key, change): _map_strings(item, change, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence):
        return [_map_strings(item, change, depth + 1) for item in value]
    return value
