"""The text: answers are true, and what is held out is never trained on."""

import json
import random
import re

import pytest
from tiny import arithmetic, context, knowledge
from tiny.sample import Sample, Split, draw, framed, is_held_out, wordings
from tiny.tasks import SHARES, TASK_NAMES, TASKS, THRESHOLDS, draw_long, draw_short, held_out
from tiny.world import COUNTRIES, REAL_COUNTRIES

from ernie_engine.evals.scoring import SCORERS, follows_schema

BY_NAME = {country.name: country for country in COUNTRIES}


def samples(task: str, split: Split, count: int = 400) -> list[Sample]:
    rng = random.Random(f"test {task}")
    return [TASKS[task](rng, split) for _ in range(count)]


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("split", Split)
def test_every_task_is_deterministic_and_takes_its_own_answer(task: str, split: Split):
    first, second = samples(task, split, 50), samples(task, split, 50)
    assert first == second
    for sample in first:
        target = sample.turns[-1]
        assert SCORERS[sample.scorer](target, target, sample.schema), sample


@pytest.mark.parametrize("task", THRESHOLDS)
def test_judged_tasks_have_500_different_held_out_questions(task: str):
    questions = held_out(task, 500)
    assert len({sample.turns[:-1] for sample in questions}) == 500
    assert questions == held_out(task, 500) != held_out(task, 500, seed=1)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_no_held_out_question_is_ever_trained_on(task: str):
    asked = {sample.turns[-2] for sample in held_out(task, 300)}
    trained = {text for sample in samples(task, Split.TRAIN, 4000) for text in sample.turns[::2]}
    if task == "turns":  # "What is my name?" is the same question everywhere, its answer is not
        asked = {text for text in asked if not re.search(r"\b(my|I)\b", text)}
    assert not asked & trained


def numbers(sample: Sample) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", sample.turns[0])]


def pairs(text: str) -> set[tuple[int, ...]]:
    """Numbers that meet in a sum, a difference or a comparison of two."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    return {tuple(sorted(numbers))} if len(numbers) == 2 else set()


def test_pairs_of_numbers_are_split():
    for split in Split:
        for sample in samples("arithmetic", split, 2000):
            for pair in pairs(sample.turns[0]):
                assert is_held_out(pair) == (split is Split.HELDOUT), sample


def test_pairs_in_chains_of_thought_are_split():
    for sample in samples("boxed", Split.TRAIN, 2000):
        for a, b in re.findall(r"(\d+) [+-] (\d+) =", sample.turns[1]):
            assert not is_held_out(tuple(sorted((int(a), int(b))))), sample


@pytest.mark.parametrize("split", Split)
def test_sums_differences_and_comparisons_are_true(split: Split):
    rng = random.Random(3)
    for _ in range(500):
        s = arithmetic.add(rng, split)
        assert int(s.turns[1]) == sum(numbers(s))
        s = arithmetic.subtract(rng, split)
        a, b = numbers(s)
        assert int(s.turns[1]) == a - b >= 0
        s = arithmetic.compare(rng, split)
        a, b = numbers(s)
        wants_larger = re.search("larger|greater|>", s.turns[0]) is not None
        if s.turns[1] in ("Yes", "No"):
            assert (s.turns[1] == "Yes") == ((a > b) if wants_larger else (a < b)), s
        else:
            assert int(s.turns[1]) == (max(a, b) if wants_larger else min(a, b)), s


@pytest.mark.parametrize("split", Split)
def test_every_step_of_a_chain_is_true(split: Split):
    for sample in samples("boxed", split, 800):
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", sample.turns[1])
        assert steps
        for a, sign, b, result in steps:
            assert int(a) + int(b) * (1 if sign == "+" else -1) == int(result)
        assert sample.turns[1].endswith(f"\\boxed{{{steps[-1][3]}}}.")


def test_the_table_is_unambiguous():
    assert len(COUNTRIES) == 40
    names = [name for country in COUNTRIES for name in country]
    assert len(set(names)) == len(names) and not set(names) & set(REAL_COUNTRIES)


@pytest.mark.parametrize("split", Split)
def test_world_answers_agree_with_the_table(split: Split):
    for sample in samples("world", split):
        (name,) = {n for n in BY_NAME if re.search(rf"\b{n}\b", sample.turns[1])}
        said = set(re.findall(r"\w+", sample.turns[1]))
        assert said & {BY_NAME[name].capital, BY_NAME[name].product}, sample


@pytest.mark.parametrize("split", Split)
def test_the_letter_stands_before_the_only_right_option(split: Split):
    counts = set()
    for sample in samples("choice", split):
        options = dict(re.findall(r"^([A-J])[.)] (\w+)$", sample.turns[0], re.MULTILINE))
        question = sample.turns[0].split("\n")[0]
        right = {c for c in COUNTRIES if set(c) & set(re.findall(r"\w+", question))}
        (country,) = right
        assert [k for k, text in options.items() if text in country] == [sample.turns[1]]
        counts.add(len(options))
    assert counts == {4, 10}


@pytest.mark.parametrize("split", Split)
def test_a_recalled_fact_stands_in_the_text_once(split: Split):
    for sample in samples("recall", split, 100):
        text, _, question = sample.turns[0].rpartition("\n")
        answer = sample.turns[1]
        value = answer.rstrip(".").split()[-1]
        found = re.match(r"The (?P<a>[\w ]+) of (?P<n>\w+) is", answer)
        stated = [answer]
        if found:
            stated.append(f"{found['n']} has the {found['a']} {value}.")
        assert sum(text.count(statement) for statement in stated) == 1, sample
        assert found is None or found["n"] in question


@pytest.mark.parametrize("split", Split)
def test_json_answers_follow_their_schema_and_their_text(split: Split):
    for sample in samples("json", split):
        value, schema = json.loads(sample.turns[1]), json.loads(sample.schema)
        assert follows_schema(value, schema) and value.keys() == schema["properties"].keys()
        assert sample.schema in sample.turns[0]
        stated = sample.turns[0].replace(sample.schema, "")
        for word in value.values():
            assert isinstance(word, bool | list) or str(word) in stated


def test_strangers_are_never_in_the_table():
    rng = random.Random(5)
    assert not {knowledge._stranger(rng) for _ in range(5000)} & BY_NAME.keys()


def test_memory_survives_the_turns_between():
    rng = random.Random(6)
    sample = context.memory(rng, Split.TRAIN, ("question", "answer"))
    assert sample.turns[2:4] == ("question", "answer")
    told = set(re.findall(r"\w+", sample.turns[0])) & set(re.findall(r"\w+", sample.turns[-1]))
    assert told - {"I", "the", "best", "like", "live", "in", "name", "is"}


def test_a_follow_up_stays_with_its_country():
    rng = random.Random(8)
    for _ in range(100):
        _, answer, question, wanted = knowledge.follow_up(rng, Split.TRAIN).turns
        (name,) = {n for n in BY_NAME if n in answer}
        assert name not in question and name in wanted and wanted != answer


def test_short_and_long_conversations():
    rng = random.Random(7)
    drawn = [draw_short(rng, Split.TRAIN) for _ in range(3000)]
    assert {sample.task for sample in drawn} == set(TASK_NAMES)
    assert any(sample.system for sample in drawn)
    only = dict.fromkeys(SHARES, 0.0) | {"copy": 1.0}
    assert {draw_short(rng, Split.TRAIN, only).task for _ in range(50)} == {"copy"}
    assert max(len(draw_long(rng, Split.TRAIN, 138).turns[0]) for _ in range(50)) > 4000


def test_wordings_are_disjoint_and_the_grid_is_split_diagonally():
    grid = framed(("a {x}", "b {x}", "c {x}", "d {x}", "e {x}"), ("1", "2", "3"))
    assert not set(grid.train) & set(grid.heldout)
    assert len(grid.train) + len(grid.heldout) == 15
    assert {text[-1] for text in grid.heldout} == {"1", "2", "3"}
    with pytest.raises(AssertionError):
        wordings("too", "few")


def test_draw_takes_either_side():
    rng = random.Random(0)
    for split in Split:
        value = draw(split, lambda: rng.randrange(1000), lambda v: [v, "never"])
        assert (is_held_out(value) or is_held_out("never")) == (split is Split.HELDOUT)
