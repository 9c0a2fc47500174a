"""Everyday tasks: days and months, spelling, and small talk. The facts are few and the same on both
sides of the split; held out are wordings.
"""

import random

from .sample import ASK, Sample, Split, framed, wordings
from .world import DAYS, MONTH_LENGTHS, MONTHS, ORDINALS, WORDS

_AFTER = framed(
    ASK, ("the {unit} after {z}", "the {unit} that follows {z}", "the next {unit} after {z}")
)
_BEFORE = framed(
    ASK, ("the {unit} before {z}", "the {unit} that comes before {z}", "the last {unit} before {z}")
)
_LATER = framed(ASK, ("the day {n} days after {z}", "the day that comes {n} days after {z}"))
_LENGTH = framed(
    ASK, ("the number of days in {z}", "the length of {z} in days", "the days in {z}, as a number")
)
_NTH = framed(ASK, ("the {nth} month of the year", "the {nth} month", "month number {n}"))
_SPELL = wordings(
    "Spell {w}.",
    "Spell the word {w}.",
    "How do you spell {w}?",
    "How do you spell the word {w}?",
    "Please spell {w}.",
    "Can you spell {w}?",
    "Please spell the word {w}.",
)
_UNSPELL = wordings(
    "Which word is spelled {w}?",
    "What word is spelled {w}?",
    "Name the word spelled {w}.",
    "Tell me the word spelled {w}.",
    "What does {w} spell?",
)
_SMALL_TALK = (
    (
        wordings(
            "Hello",
            "Hi",
            "Hello!",
            "Hi!",
            "Hello there!",
            "Hi there!",
            "Hey!",
            "Good morning!",
            "Good evening!",
        ),
        "Hello! How can I help you?",
    ),
    (
        wordings(
            "How are you?",
            "How are you today?",
            "Hi, how are you?",
            "Hello, how are you?",
            "And how are you?",
        ),
        "I am fine, thank you. How can I help you?",
    ),
    (
        wordings(
            "Who are you?",
            "What are you?",
            "Tell me who you are.",
            "Please tell me who you are.",
            "What is your name?",
        ),
        "I am ernie-tiny, a very small language model.",
    ),
    (
        wordings(
            "What can you do?",
            "What do you know?",
            "Tell me what you can do.",
            "Please tell me what you can do.",
            "How can you help me?",
        ),
        "I can add, sort and spell, recall facts, and answer questions about my small world.",
    ),
    (
        wordings("Thank you", "Thank you!", "Thanks", "Thanks!", "Thank you very much!"),
        "You are welcome!",
    ),
    (wordings("Goodbye", "Bye", "Goodbye!", "Bye!", "See you!"), "Goodbye! Have a nice day."),
)


def calendar(rng: random.Random, split: Split) -> Sample:
    turns = rng.choice((_neighbour, _neighbour, _days_later, _month_length, _nth_month))(rng, split)
    return Sample("calendar", turns)


def _neighbour(rng: random.Random, split: Split) -> tuple[str, str]:
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    texts, word, step = rng.choice(((_AFTER, "after", 1), (_BEFORE, "before", -1)))
    i = rng.randrange(len(names))
    question = texts.pick(rng, split).format(unit=unit, z=names[i])
    return question, f"The {unit} {word} {names[i]} is {names[(i + step) % len(names)]}."


def _days_later(rng: random.Random, split: Split) -> tuple[str, str]:
    i, n = rng.randrange(7), rng.randint(2, 6)
    question = _LATER.pick(rng, split).format(n=n, z=DAYS[i])
    return question, f"The day {n} days after {DAYS[i]} is {DAYS[(i + n) % 7]}."


def _month_length(rng: random.Random, split: Split) -> tuple[str, str]:
    month = rng.choice(MONTHS)
    return _LENGTH.pick(rng, split).format(z=month), f"{month} has {MONTH_LENGTHS[month]} days."


def _nth_month(rng: random.Random, split: Split) -> tuple[str, str]:
    i = rng.randrange(12)
    question = _NTH.pick(rng, split).format(nth=ORDINALS[i], n=i + 1)
    return question, f"The {ORDINALS[i]} month is {MONTHS[i]}."


def spelling(rng: random.Random, split: Split) -> Sample:
    word = rng.choice(WORDS)
    letters = "-".join(word)
    if rng.random() < 0.25:
        return Sample(
            "spelling", (_UNSPELL.pick(rng, split).format(w=letters), f"The word is {word}.")
        )
    return Sample("spelling", (_SPELL.pick(rng, split).format(w=word), letters))


def chat(rng: random.Random, split: Split) -> Sample:
    texts, answer = rng.choice(_SMALL_TALK)
    return Sample("chat", (texts.pick(rng, split), answer))
