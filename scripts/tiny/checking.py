"""The check of a written checkpoint: held-out accuracy by generation, drafting, and planted faults.

Everything is read back from the folder through transformers; nothing of the training run is reused.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie_engine.evals.harness import Question, Record, run
from ernie_engine.evals.report import Score, scores, table

from . import checkpoint
from .answerer import TransformersAnswerer
from .faults import FAULTS, plant
from .probe import Probe
from .sample import Sample
from .settings import Settings
from .tasks import MTP_THRESHOLD, TASK_NAMES, THRESHOLDS, held_out
from .tokenizer import ChatEncoder

MAX_NEW_TOKENS = 128
_FAULT_TASKS = ("arithmetic", "world", "json", "boxed", "lists", "copy", "turns", "unknown")
_FAULT_SAMPLES = 200  # a task
_FAULT_TOKENS = 96  # enough for their right answers, and an end to a faulty model's


@dataclass(frozen=True)
class Findings:
    """What was measured; `missed` names what lies below its threshold."""

    scores: list[Score]
    drafting: dict[str, float]  # share of tokens t+2 found, among answers and among all
    faults: dict[str, list[Score]]  # the same questions; "none" is the checkpoint as it is

    def missed(self) -> list[str]:
        by_task = {score.task: score.accuracy for score in self.scores}
        low = [task for task, limit in THRESHOLDS.items() if by_task.get(task, 0.0) < limit]
        return low + ["drafting"] * (self.drafting["answers"] < MTP_THRESHOLD)

    def text(self) -> str:
        drafting = ", ".join(f"{name} {share:.4f}" for name, share in self.drafting.items())
        faults = "\n".join(
            f"{fault}: " + ", ".join(f"{s.task} {s.accuracy:.4f}" for s in rows)
            for fault, rows in self.faults.items()
        )
        return f"{table(self.scores)}\nnext-next token: {drafting}\nplanted faults\n{faults}"


def questions(tasks: Iterable[str], count: int, seed: int = 0) -> list[Question]:
    """Held-out questions for the harness, in the order of the tasks."""
    return [
        _question(f"{task}-{i}", sample)
        for task in tasks
        for i, sample in enumerate(held_out(task, count, seed))
    ]


def _question(name: str, sample: Sample) -> Question:
    roles = ("user", "assistant") * (len(sample.turns) // 2)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, sample.turns[:-1], strict=False)
    ]
    if sample.system:
        messages.insert(0, {"role": "system", "content": sample.system})
    target = sample.turns[-1]
    return Question(name, sample.task, tuple(messages), target, sample.scorer, sample.schema)


def ask(
    folder: Path, asked: list[Question], max_tokens: int, dtype: str, device: str
) -> list[Record]:
    """Answers of a checkpoint under transformers, one task at a time."""
    answerer = TransformersAnswerer(folder, dtype, device)
    by_task = [
        [q for q in asked if q.task == task] for task in dict.fromkeys(q.task for q in asked)
    ]
    batches = [run(group, answerer, max_tokens, len(group), progress=False) for group in by_task]
    return [record for records in batches for record in records]


def check(folder: Path, settings: Settings, device: str) -> Findings:
    """Measure everything that the model card says."""
    asked = questions(TASK_NAMES, settings.check_samples)
    found = scores(ask(folder, asked, MAX_NEW_TOKENS, settings.check_dtype, device))
    model = checkpoint.load(folder, getattr(torch, settings.check_dtype), device)
    encoder = ChatEncoder((folder / "tokenizer.model").read_bytes())
    drafting = Probe(encoder, settings.check_samples, seed=0, device=device).drafting(model)
    few = questions(_FAULT_TASKS, min(_FAULT_SAMPLES, settings.check_samples))
    with tempfile.TemporaryDirectory() as name:
        faults = {"none": scores(ask(folder, few, _FAULT_TOKENS, settings.check_dtype, device))}
        for fault in FAULTS:
            faults[fault] = _faulty(folder, Path(name), fault, few, settings, device)
    return Findings(found, drafting, faults)


def _faulty(
    folder: Path, scratch: Path, fault: str, asked: list[Question], settings: Settings, device: str
) -> list[Score]:
    plant(folder, scratch / fault, fault, settings.hidden // settings.heads)
    records = ask(scratch / fault, asked, _FAULT_TOKENS, settings.check_dtype, device)
    return scores(records)
