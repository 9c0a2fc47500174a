"""Numbers to 999: sums, differences, comparisons, sorted lists, and short chains of thought that
end in a box.

Every pair of numbers that meets in a sum, a difference or a comparison is a key of `draw`, which
keeps a tenth of all pairs for the held-out side: no operation ever shows a held-out pair in
training.
"""

import random

from .sample import Sample, Split, draw, framed, wordings
from .world import OBJECTS, PEOPLE

Pair = tuple[int, int]

_CALCULATE = (
    "What is {x}?",
    "Calculate {x}.",
    "Compute {x}.",
    "How much is {x}?",
    "Work out {x}.",
    "Please find {x}.",
    "Tell me {x}.",
    "What do you get for {x}?",
    "Can you work out {x}?",
)
_IS_IT = ("Is it true that {x}?", "Is this right: {x}?", "True or not: {x}?", "Tell me if {x}.")
_COMPARE = (
    "Which is {x}, {a} or {b}?",
    "Which number is {x}: {a} or {b}?",
    "What is the {x} number, {a} or {b}?",
    "Which number is {x}, {a} or {b}?",
    "Tell me the {x} number: {a} or {b}.",
    "Tell me which is {x}, {a} or {b}.",
    "Name the {x} of {a} and {b}.",
    "What is the {x} of {a} and {b}?",
)
_SORT = (
    "Sort these numbers, {x}: ",
    "Sort {x}: ",
    "Put these numbers in order, {x}: ",
    "Order these numbers, {x}: ",
    "Please sort, {x}: ",
)
_BOX = wordings(
    "{x} Think step by step and put the answer in \\boxed{{}}.",
    "{x} Show your steps and put the answer in a box.",
    "{x} Think step by step. End with \\boxed{{}}.",
    "{x} Show your steps. End with \\boxed{{}}.",
    "{x} Think step by step and end with a box.",
)

_ADD = framed(_CALCULATE, ("{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"))
_SUBTRACT = framed(_CALCULATE, ("{a} - {b}", "{a} minus {b}", "the difference of {a} and {b}"))
_LARGER = framed(_COMPARE, ("larger", "greater"))
_SMALLER = framed(_COMPARE, ("smaller", "lesser"))
_IS_GREATER = framed(_IS_IT, ("{a} is greater than {b}", "{a} is larger than {b}", "{a} > {b}"))
_IS_LESS = framed(_IS_IT, ("{a} is less than {b}", "{a} is smaller than {b}", "{a} < {b}"))
_SORT_UP = framed(_SORT, ("smallest first", "from smallest to largest", "small to large"))
_SORT_DOWN = framed(_SORT, ("largest first", "from largest to smallest", "large to small"))


def _number(rng: random.Random) -> int:
    """Mostly three digits, as uniform numbers are; small ones often enough to be learned."""
    return rng.randint(0, 999 if rng.random() < 0.85 else 99)


def _key(a: int, b: int) -> Pair:
    return (min(a, b), max(a, b))


def _pair(rng: random.Random, split: Split) -> Pair:
    return draw(split, lambda: (_number(rng), _number(rng)), lambda pair: [_key(*pair)])


def add(rng: random.Random, split: Split) -> Sample:
    a, b = _pair(rng, split)
    return Sample("arithmetic", (_ADD.pick(rng, split).format(a=a, b=b), str(a + b)))


def subtract(rng: random.Random, split: Split) -> Sample:
    b, a = sorted(_pair(rng, split))
    return Sample("arithmetic", (_SUBTRACT.pick(rng, split).format(a=a, b=b), str(a - b)))


def compare(rng: random.Random, split: Split) -> Sample:
    a, b = draw(split, lambda: _different(rng), lambda pair: [_key(*pair)])
    texts, answer = rng.choice(
        (
            (_LARGER, str(max(a, b))),
            (_SMALLER, str(min(a, b))),
            (_IS_GREATER, "Yes" if a > b else "No"),
            (_IS_LESS, "Yes" if a < b else "No"),
        )
    )
    return Sample("arithmetic", (texts.pick(rng, split).format(a=a, b=b), answer))


def _different(rng: random.Random) -> Pair:
    """Two different numbers, a third of the time close to each other, where comparing is hard."""
    a = _number(rng)
    b = min(999, max(0, a + rng.randint(-12, 12))) if rng.random() < 0.33 else _number(rng)
    return (a, b) if a != b else _different(rng)


def sort(rng: random.Random, split: Split) -> Sample:
    numbers = draw(split, lambda: rng.sample(range(1000), rng.randint(3, 6)), lambda drawn: [drawn])
    texts, descending = rng.choice(((_SORT_UP, False), (_SORT_DOWN, True)))
    question = texts.pick(rng, split) + ", ".join(map(str, numbers))
    return Sample("lists", (question, ", ".join(map(str, sorted(numbers, reverse=descending)))))


def boxed(rng: random.Random, split: Split) -> Sample:
    """A word problem of one or two steps; the answer shows the steps and ends in `\\boxed{}`."""
    story, steps, result = rng.choice((_gain, _loss, _gain_and_loss, _three))(rng, split)
    question = _BOX.pick(rng, split).format(x=story)
    return Sample("boxed", (question, f"{steps} The answer is \\boxed{{{result}}}."), "boxed")


def _gain(rng: random.Random, split: Split) -> tuple[str, str, int]:
    a, b = _pair(rng, split)
    who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
    story = f"{who} has {a} {what}s and gets {b} more. How many {what}s are there now?"
    return story, f"{a} + {b} = {a + b}.", a + b


def _loss(rng: random.Random, split: Split) -> tuple[str, str, int]:
    b, a = sorted(_pair(rng, split))
    who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
    story = f"{who} has {a} {what}s and sells {b}. How many {what}s are left?"
    return story, f"{a} - {b} = {a - b}.", a - b


def _gain_and_loss(rng: random.Random, split: Split) -> tuple[str, str, int]:
    a, b, c = _triple(rng, split)
    who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
    if c > a + b:
        return _three(rng, split)
    story = f"{who} has {a} {what}s, buys {b} more and then sells {c}. How many {what}s are left?"
    return story, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


def _three(rng: random.Random, split: Split) -> tuple[str, str, int]:
    a, b, c = _triple(rng, split)
    steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return f"What is {a} + {b} + {c}?", steps, a + b + c


def _triple(rng: random.Random, split: Split) -> tuple[int, int, int]:
    return draw(
        split,
        lambda: (rng.randint(0, 499), rng.randint(0, 499), rng.randint(0, 499)),
        lambda abc: [_key(abc[0], abc[1]), _key(abc[0] + abc[1], abc[2])],
    )
