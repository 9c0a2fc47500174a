"""Tables from records: accuracy per task with its interval, and two runs compared question by
question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .harness import Record
from .intervals import paired_p_value, wilson


@dataclass(frozen=True)
class Score:
    """Accuracy of one task; low and high bound its 95% interval."""

    task: str
    count: int
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same questions of one task, counted sample by sample."""

    task: str
    count: int
    same_answer: int
    only_first: int
    only_second: int
    p_value: float


def scores(records: Sequence[Record]) -> list[Score]:
    """One row a task, in order of first appearance."""
    return [_score(task, group) for task, group in _by_task(records).items()]


def _by_task(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.task, []).append(record)
    return groups


def _score(task: str, records: Sequence[Record]) -> Score:
    right = sum(record.right for record in records)
    return Score(task, len(records), right, right / len(records), *wilson(right, len(records)))


def compare(first: Sequence[Record], second: Sequence[Record]) -> list[Comparison]:
    """Lay two runs side by side by question id; both must hold the same ids."""
    others = {record.id: record for record in second}
    if {record.id for record in first} != others.keys():
        raise ValueError(
            "the two runs answer different questions: same tasks, limit and seed are needed"
        )
    return [
        _compare(task, [(record, others[record.id]) for record in records])
        for task, records in _by_task(first).items()
    ]


def _compare(task: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    only_first = sum(a.right and not b.right for a, b in pairs)
    only_second = sum(b.right and not a.right for a, b in pairs)
    same = sum(a.answer == b.answer for a, b in pairs)
    p_value = paired_p_value(only_first, only_second)
    return Comparison(task, len(pairs), same, only_first, only_second, p_value)


def table(rows: Sequence[Score] | Sequence[Comparison]) -> str:
    """A Markdown table with the fields as columns, aligned for reading as plain text too."""
    cells = [[_cell(value) for value in asdict(row).values()] for row in rows]
    header = [name.replace("_", " ") for name in asdict(rows[0])]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, rule, *cells)
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
