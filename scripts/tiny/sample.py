"""What a task makes: a Sample; and how training and held-out questions are kept apart by
construction.

Numbers and names are split by a hash of the drawn values, wordings by their place in a grid of
frames and phrases. Never split by chance: the same value or wording lies on the same side for every
seed.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import TypeVar

T = TypeVar("T")


class Split(Enum):
    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with the wanted answer. `turns` alternate user, assistant, ...,
    assistant.

    `scorer` names how the last answer is judged ("exact", "choice", "boxed", "json"); `schema` is
    JSON text for the last of these.
    """

    task: str
    turns: tuple[str, ...]
    scorer: str = "exact"
    schema: str = ""
    system: str = ""

    def __post_init__(self):
        assert len(self.turns) >= 2 and len(self.turns) % 2 == 0, self.turns


def is_held_out(key: object) -> bool:
    """True for a tenth of all keys, by a hash of their repr that knows no seed."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


def draw(split: Split, make: Callable[[], T], keys: Callable[[T], Sequence[object]]) -> T:
    """Call `make` until its result lies in `split`: held out as soon as one of its keys is.

    The keys must vary from call to call, or this never ends.
    """
    while True:
        value = make()
        if any(map(is_held_out, keys(value))) == (split is Split.HELDOUT):
            return value


@dataclass(frozen=True)
class Wordings:
    """The ways to ask one thing, as format strings; every fifth is never trained on."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def pick(self, rng: random.Random, split: Split) -> str:
        return rng.choice(self.train if split is Split.TRAIN else self.heldout)


def wordings(*texts: str) -> Wordings:
    """Split at least five given texts."""
    assert len(texts) >= 5, texts
    return Wordings(
        train=tuple(text for i, text in enumerate(texts) if i % 5 != 3),
        heldout=texts[3::5],
    )


def framed(frames: tuple[str, ...], phrases: tuple[str, ...], *more: str) -> Wordings:
    """Every frame around every phrase, the cells of the grid split along diagonals; `more` are
    split apart.

    A frame holds `{x}` where the phrase goes: ("What is {x}?",) and ("the capital of {c}",).
    """
    grid = wordings(*(frame.replace("{x}", phrase) for frame, phrase in product(frames, phrases)))
    if not more:
        return grid
    extra = wordings(*more)
    return Wordings(grid.train + extra.train, grid.heldout + extra.heldout)


ASK = (
    "What is {x}?",
    "Name {x}.",
    "Tell me {x}.",
    "Do you know {x}?",
    "Can you name {x}?",
    "Please tell me {x}.",
    "Could you tell me {x}?",
    "I would like to know {x}.",
    "Give me {x}.",
    "I need to know {x}.",
)
