"""Questions to records to tables, with an answerer made of a function."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ernie_engine.evals.harness import Question, Record, read_records, run, score, write_records
from ernie_engine.evals.report import compare, scores, table
from ernie_engine.evals.transport import Message


def make_question(i: int, target: str, task: str = "t", scorer: str = "exact") -> Question:
    return Question(f"{task}-{i}", task, ({"role": "user", "content": str(i)},), target, scorer)


def double(conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
    return [str(2 * int(messages[-1]["content"])) for messages in conversations]


def test_run_keeps_order_over_uneven_batches():
    questions = [make_question(i, str(2 * i) if i % 3 else "wrong") for i in range(7)]
    records = run(questions, double, max_tokens=8, batch_size=3, progress=False)
    assert [r.id for r in records] == [q.id for q in questions]
    assert [r.right for r in records] == [i % 3 != 0 for i in range(7)]
    assert records[4].answer == "8"


def test_run_passes_max_tokens_and_batches():
    seen = []

    def watch(conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
        seen.append((len(conversations), max_tokens))
        return [""] * len(conversations)

    run([make_question(i, "") for i in range(5)], watch, 9, 2, progress=False)
    assert seen == [(2, 9), (2, 9), (1, 9)]


def test_a_lost_answer_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        run([make_question(1, "2")], lambda conversations, max_tokens: [], 8, 1, progress=False)


def test_unknown_scorer_is_named():
    with pytest.raises(ValueError, match="'guess'"):
        score(make_question(1, "2", scorer="guess"), "2")


def test_records_survive_a_file(tmp_path: Path):
    records = [Record("a-0", "a", "q\n", "é", '"x"', True), Record("a-1", "a", "", "", "", False)]
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl") == records


def test_scores_by_task_and_table():
    records = [Record(f"{t}-{i}", t, "", "", "", i < 3) for t in ("b", "a") for i in range(4)]
    rows = scores(records)
    assert [(r.task, r.count, r.right, r.accuracy) for r in rows] == [
        ("b", 4, 3, 0.75),
        ("a", 4, 3, 0.75),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "0.7500" in lines[2]


def test_compare_counts_each_kind_of_difference():
    first = [Record(f"t-{i}", "t", "", "", "x", i < 6) for i in range(10)]
    second = [Record(f"t-{i}", "t", "", "", "x" if i else "y", i >= 5) for i in range(10)]
    (row,) = compare(first, second[::-1])
    assert (row.count, row.same_answer, row.only_first, row.only_second) == (10, 9, 5, 4)


def test_compare_refuses_other_questions():
    with pytest.raises(ValueError, match="different questions"):
        compare([Record("t-0", "t", "", "", "", True)], [Record("t-1", "t", "", "", "", True)])
