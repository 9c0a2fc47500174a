"""eval_tiny.py: engine, transformers and files; and, on the real checkpoint, what it is for."""

import json
from pathlib import Path

import eval_tiny
import pytest
from tiny.checking import MAX_NEW_TOKENS, questions
from tiny.settings import Settings

from ernie_engine.evals.harness import read_records


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["eval_tiny.py", *map(str, arguments)])
    eval_tiny.main()


def test_both_backends_print_a_table_and_json(
    smoke: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    files = []
    for backend in ("engine", "transformers"):
        files.append(tmp_path / f"{backend}.jsonl")
        options = ("--task", "spelling", "--task", "recall", "--limit", 2, "--output", files[-1])
        call(monkeypatch, "--model", smoke.out, "--backend", backend, *options)
        *lines, last = capsys.readouterr().out.splitlines()
        assert lines[-4].startswith("| task") and lines[-1].startswith("| recall")
        assert [(row["task"], row["count"]) for row in json.loads(last)] == [
            ("spelling", 2),
            ("recall", 2),
        ]
    call(monkeypatch, "--compare", *files)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["same_answer"] for row in rows] == [2, 2]
    assert len(read_records(files[0])[0].answer) > 0


def test_answers_have_room():
    longest = max(len(q.target) for q in questions(("json", "boxed", "lists", "world"), 200))
    assert longest // 2 <= MAX_NEW_TOKENS
