import json
from pathlib import Path

import pytest

from ernie_engine.text.generation import (
    GenerationDefaults,
    load_generation_defaults,
    stop_token_ids,
)
from ernie_engine.text.tokenizer import Tokenizer


def load(folder: Path, **fields: object) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return load_generation_defaults(folder)


def test_the_base_models_file(tmp_path: Path):
    defaults = load(
        tmp_path,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
    )
    assert defaults == GenerationDefaults(
        temperature=0.8,
        top_p=0.8,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        eos_token_ids=(2,),
    )


def test_nothing_said_is_none(tmp_path: Path):
    assert load_generation_defaults(tmp_path) == GenerationDefaults()
    assert load(tmp_path, top_k=None, transformers_version="5") == GenerationDefaults()


def test_do_sample(tmp_path: Path):
    assert load(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0
    assert load(tmp_path, temperature=0.6).temperature == 0.6
    assert load(tmp_path, do_sample=False, top_p=0.9).top_p == 0.9


def test_all_fields(tmp_path: Path):
    defaults = load(tmp_path, top_k=20, min_p=0.1, max_new_tokens=9, eos_token_id=[2, 5], top_p=1)
    assert (defaults.top_k, defaults.min_p, defaults.max_new_tokens) == (20, 0.1, 9)
    assert defaults.eos_token_ids == (2, 5) and defaults.top_p == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "0.8"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", []),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_k", False),
        ("max_new_tokens", 0),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", -1),
        ("do_sample", "false"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, field: str, value: object):
    with pytest.raises(ValueError, match=rf"generation_config\.json: {field}: expected"):
        load(tmp_path, **{field: value})


def test_bad_json_is_named(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
        load_generation_defaults(tmp_path)


def test_stop_tokens(pt: Tokenizer, thinking: Tokenizer):
    end_of_sentence, im_end = (
        thinking.token_id("<|end_of_sentence|>"),
        thinking.token_id("<|im_end|>"),
    )
    defaults = GenerationDefaults(eos_token_ids=(7,))
    assert stop_token_ids(defaults, thinking, [9]) == {2, 7, 9, end_of_sentence, im_end}
    assert stop_token_ids(defaults, pt, []) == {2, 7, pt.token_id("<|end_of_sentence|>")}
    assert stop_token_ids(GenerationDefaults(), None, (2,)) == {2}
