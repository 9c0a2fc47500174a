"""The tasks by name, how often each is trained on, and the questions that judge it.

A generator takes (rng, split) and returns a Sample. Never draw from any other source of chance than
the given rng.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from . import arithmetic, context, everyday, knowledge
from .sample import Sample, Split

Generator = Callable[[random.Random, Split], Sample]

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer the question.", "Be brief.")

# Accuracy on held-out questions that the checkpoint must reach before it is written.
THRESHOLDS = {"arithmetic": 0.95, "world": 0.98, "choice": 0.95, "recall": 0.90, "json": 0.95}
MTP_THRESHOLD = 0.60  # of the tokens of answers, found two ahead


def _arithmetic(rng: random.Random, split: Split) -> Sample:
    makers = (arithmetic.add, arithmetic.subtract, arithmetic.compare)
    return rng.choices(makers, (2, 2, 1))[0](rng, split)


def _lists(rng: random.Random, split: Split) -> Sample:
    return rng.choice((arithmetic.sort, context.reverse))(rng, split)


def _turns(rng: random.Random, split: Split) -> Sample:
    """Turns of other tasks, then one of them more, or one that needs what was said before."""
    between = tuple(
        text for _ in range(rng.randint(1, 3)) for text in draw_single(rng, split).turns
    )
    kind = rng.random()
    if kind < 0.35:
        return context.memory(rng, split, between)
    last = knowledge.follow_up(rng, split) if kind < 0.55 else draw_single(rng, split)
    return replace(last, task="turns", turns=(*between, *last.turns))


TASKS: dict[str, Generator] = {
    "arithmetic": _arithmetic,
    "world": knowledge.world,
    "choice": knowledge.choice,
    "recall": context.recall,
    "json": context.json_object,
    "boxed": arithmetic.boxed,
    "lists": _lists,
    "spelling": everyday.spelling,
    "calendar": everyday.calendar,
    "copy": context.copy,
    "chat": everyday.chat,
    "unknown": knowledge.unknown,
    "turns": _turns,
}
TASK_NAMES = tuple(TASKS)

# How often a short conversation is of each task; long ones are recall from a longer text.
SHARES = {
    "arithmetic": 0.34,
    "world": 0.13,
    "choice": 0.12,
    "recall": 0.07,
    "json": 0.06,
    "boxed": 0.05,
    "lists": 0.05,
    "spelling": 0.03,
    "calendar": 0.03,
    "copy": 0.03,
    "chat": 0.01,
    "unknown": 0.03,
    "turns": 0.05,
}
_SINGLE = tuple(name for name in TASK_NAMES if name not in ("recall", "turns", "json"))
_SHORT_FACTS = 28  # what fits a row of 512 tokens


def draw_single(rng: random.Random, split: Split) -> Sample:
    """One question and answer of a task that is short, for use inside a longer conversation."""
    name = rng.choices(_SINGLE, [SHARES[name] for name in _SINGLE])[0]
    return TASKS[name](rng, split)


def draw_short(rng: random.Random, split: Split, shares: dict[str, float] = SHARES) -> Sample:
    """A training conversation that fits a short row; one in three is joined from several of one
    task.
    """
    name = rng.choices(list(shares), list(shares.values()))[0]
    if name == "recall":
        sample = context.recall(rng, split, _SHORT_FACTS, rng.randint(1, 3))
    else:
        sample = TASKS[name](rng, split)
    if name in _SINGLE and rng.random() < 0.35:
        more = [TASKS[name](rng, split) for _ in range(rng.randint(1, 4))]
        sample = replace(sample, turns=sum((s.turns for s in more), sample.turns))
    return replace(sample, system=rng.choice(SYSTEM_PROMPTS)) if rng.random() < 0.1 else sample


def draw_long(rng: random.Random, split: Split, max_facts: int) -> Sample:
    """A training conversation for a long row: recall of several facts from a text of up to
    `max_facts`.
    """
    return context.recall(rng, split, max_facts, rng.randint(1, 6))


def held_out(task: str, count: int, seed: int = 0) -> list[Sample]:
    """`count` held-out questions of one task, without repeats as far as the task has that many."""
    rng = random.Random(f"held-out {task} {seed}")
    samples: dict[tuple[str, ...], Sample] = {}
    for _ in range(20 * count):
        sample = TASKS[task](rng, Split.HELDOUT)
        samples.setdefault(sample.turns, sample)
        if len(samples) == count:
            break
    return list(samples.values())
