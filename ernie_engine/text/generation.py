"""What a checkpoint says about generating: sampling defaults and the tokens that end an answer.

Reads generation_config.json. A value of the caller always wins over what is read here.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_engine.text.files import read_json
from ernie_engine.text.tokenizer import Tokenizer

_TURN_ENDS = ("<|end_of_sentence|>", "<|im_end|>")  # how the PT and Thinking templates end a turn
_LARGEST = 1e30
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number >= 0", lambda x: x >= 0),
    "top_p": ("a number in (0, 1]", lambda x: 0 < x <= 1),
    "min_p": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number > 0", lambda x: x > 0),
    "presence_penalty": ("a number", lambda x: True),
    "frequency_penalty": ("a number", lambda x: True),
}
_INTEGERS: dict[str, tuple[str, int]] = {
    "top_k": ("an integer >= 0, or -1 (0 and -1: no limit)", -1),
    "max_new_tokens": ("an integer >= 1", 1),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """None where the checkpoint says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """The defaults in `folder`; all None without the file. ValueError names a bad field.

    An explicit `do_sample: false` means greedy, temperature 0; without the key the values apply.
    """
    path = folder / "generation_config.json"
    data = read_json(path) or {}
    values = {name: _number(data.get(name), name, path) for name in _NUMBERS}
    integers = {name: _integer(data.get(name), name, path) for name in _INTEGERS}
    do_sample = data.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ValueError(f"{path}: do_sample: expected true or false, found {do_sample!r}")
    if do_sample is False:
        values["temperature"] = 0.0
    eos_token_ids = _token_ids(data.get("eos_token_id"), path)
    return GenerationDefaults(**values, **integers, eos_token_ids=eos_token_ids)


def stop_token_ids(
    defaults: GenerationDefaults, tokenizer: Tokenizer | None, model_eos_ids: Collection[int]
) -> frozenset[int]:
    """The tokens that end an answer: of config.json, generation_config.json, the tokenizer, and
    the end of a turn in ERNIE's templates where the vocabulary has it."""
    ids = {*model_eos_ids, *defaults.eos_token_ids}
    if tokenizer is not None:
        ends = [tokenizer.eos_token_id, *map(tokenizer.token_id, _TURN_ENDS)]
        ids.update(token_id for token_id in ends if token_id is not None)
    return frozenset(ids)


def _number(value: Any, name: str, path: Path) -> float | None:
    expected, accepted = _NUMBERS[name]
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _LARGEST or not accepted(value):  # NaN too
        raise ValueError(f"{path}: {name}: expected {expected}, found {value!r}")
    return float(value)


def _integer(value: Any, name: str, path: Path) -> int | None:
    expected, smallest = _INTEGERS[name]
    if value is None:
        return None
    if not _is_integer(value) or value < smallest:
        raise ValueError(f"{path}: {name}: expected {expected}, found {value!r}")
    return value


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_integer(token_id) and token_id >= 0 for token_id in ids):
        raise ValueError(f"{path}: eos_token_id: expected a token id or a list, found {value!r}")
    return tuple(ids)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
