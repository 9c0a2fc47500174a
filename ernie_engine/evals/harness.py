"""Questions in, records out: runs an answerer over questions and scores what comes back.

Owns the two record types and their JSONL form. Never knows how an answer is made, or which tasks
exist.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .scoring import SCORERS
from .transport import Answerer, Message


@dataclass(frozen=True)
class Question:
    """`id` is unique and stable, so that two runs can be laid side by side; `schema` is for scorer
    "json".
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    target: str
    scorer: str = "exact"
    schema: str = ""


@dataclass(frozen=True)
class Record:
    """What one question got: the answer as it came, and whether its scorer took it."""

    id: str
    task: str
    question: str
    target: str
    answer: str
    right: bool


def run(
    questions: Sequence[Question],
    answerer: Answerer,
    max_tokens: int,
    batch_size: int,
    progress: bool = True,
) -> list[Record]:
    """Ask all questions in order, `batch_size` at a time, and score the answers."""
    records: list[Record] = []
    with tqdm(total=len(questions), unit="question", disable=not progress) as bar:
        for batch in _batches(questions, batch_size):
            answers = answerer([question.messages for question in batch], max_tokens)
            records += [
                score(question, answer) for question, answer in zip(batch, answers, strict=True)
            ]
            bar.update(len(batch))
            bar.set_postfix(right=f"{sum(r.right for r in records) / len(records):.3f}")
    return records


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def score(question: Question, answer: str) -> Record:
    """Judge one answer by the scorer that its question names."""
    if question.scorer not in SCORERS:
        raise ValueError(f"scorer: {question.scorer!r} is not known; use one of {sorted(SCORERS)}")
    right = SCORERS[question.scorer](answer, question.target, question.schema)
    last = question.messages[-1]["content"]
    return Record(question.id, question.task, last, question.target, answer, right)


def write_records(path: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
