"""Scorers: what they take, what they refuse."""

import json

import pytest

from ernie_engine.evals.scoring import (
    SCORERS,
    boxed,
    choice_letter,
    exact_match,
    follows_schema,
    json_follows,
)

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def test_exact_match_ignores_blanks_only():
    assert exact_match(" 725\n", "725")
    assert exact_match("a  b", "a b")
    assert not exact_match("725.", "725")
    assert not exact_match("72 5", "725")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (C) Tarn", "C"),
        ("D. wool", "D"),
        ("The answer is J.", "J"),
        ("A city in the north. The answer is (B).", "B"),
        ("Answer: E", "E"),
        ("I'm not sure", None),
        ("Krando", None),
        ("K", None),
        ("", None),
    ],
)
def test_choice_letter(answer: str, letter: str | None):
    assert choice_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "inside"),
    [
        ("\\boxed{7}", "7"),
        ("first \\boxed{1}, then \\boxed{ 2 }.", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{3} and an open \\boxed{4", "3"),
        ("\\boxed{", None),
        ("7", None),
    ],
)
def test_boxed_takes_the_last_closed_box(answer: str, inside: str | None):
    assert boxed(answer) == inside


def test_a_missing_box_is_never_right():
    assert not SCORERS["boxed"]("no box", "no box either", "")


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Mara", "age": 31}',
        ' {"age": 0, "name": "", "more": null}\n',
    ],
)
def test_valid_json(answer: str):
    assert json_follows(answer, json.dumps(PERSON))


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Mara"}',
        '{"name": "Mara", "age": "31"}',
        '{"name": "Mara", "age": true}',
        '{"name": "Mara", "age": 31} and more',
        '{"name": "Mara", "age": NaN}',
        "[]",
        "",
    ],
)
def test_invalid_json(answer: str):
    assert not json_follows(answer, json.dumps(PERSON))


def test_schema_keywords():
    assert follows_schema(["a"], {"type": "array", "items": {"type": "string"}})
    assert not follows_schema(["a", 1], {"type": "array", "items": {"type": "string"}})
    assert not follows_schema("red", {"enum": ["blue"]})
    closed = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    assert follows_schema({"a": 1}, closed)
    assert not follows_schema({"b": 1}, closed)
    with pytest.raises(ValueError, match="pattern"):
        follows_schema("x", {"type": "string", "pattern": "x"})
