"""Questions about the closed world: the table, multiple choice over it, and what was not taught.

The facts are the same on both sides of the split; held out are wordings and combinations.
"""

import random

from .sample import ASK, Sample, Split, draw, framed, wordings
from .world import COUNTRIES, REAL_COUNTRIES, UNTAUGHT, Country

UNKNOWN_ANSWER = "I don't know."

_CAPITAL = framed(
    ASK,
    ("the capital of {c}", "the capital city of {c}", "{c}'s capital"),
    "Which city is the capital of {c}?",
    "What city is {c}'s capital?",
    "In which city does {c} have its capital?",
    "Which city does {c} have as its capital?",
    "What is the capital of the country {c}?",
)
_PRODUCT = framed(
    ASK,
    ("the main product of {c}", "the product that {c} makes", "{c}'s main product"),
    "What does {c} make?",
    "Which product is {c} known for?",
    "What is {c} known for?",
    "Which product does {c} make?",
    "What is made in {c}?",
)
_BY_CAPITAL = framed(
    ASK,
    (
        "the country with the capital {k}",
        "the country whose capital is {k}",
        "the country that has the capital {k}",
    ),
    "Which country has the capital {k}?",
    "{k} is the capital of which country?",
    "Which country has {k} as its capital?",
    "What country has the capital {k}?",
    "What country is {k} the capital of?",
)
_BY_PRODUCT = framed(
    ASK,
    ("the country that makes {p}", "the country known for {p}", "the country where they make {p}"),
    "Which country makes {p}?",
    "Where do they make {p}?",
    "Which country is known for {p}?",
    "What country makes {p}?",
    "What country is known for {p}?",
)
_TWO_HOP = framed(
    ASK,
    (
        "the main product of the country with the capital {k}",
        "the main product of the country whose capital is {k}",
    ),
)
_IS_CAPITAL = wordings(
    "Is {k} the capital of {c}?",
    "Is it true that {k} is the capital of {c}?",
    "Is this right: {k} is the capital of {c}?",
    "Tell me if {k} is the capital of {c}.",
    "True or not: {k} is the capital of {c}?",
)
_LETTER = wordings(
    "Answer with the letter.",
    "Answer with one letter.",
    "Reply with the letter.",
    "Reply with one letter.",
    "Give the letter.",
    "Choose one letter.",
    "Choose the letter.",
)
_ITS_CAPITAL = wordings(
    "And its capital?",
    "What is its capital?",
    "And what is its capital?",
    "And what is the capital?",
    "Which city is its capital?",
)
_ITS_PRODUCT = wordings(
    "And its main product?",
    "What is its main product?",
    "And what does it make?",
    "And what is its main product?",
    "What does it make?",
)
_UNKNOWN = framed(ASK, UNTAUGHT)
_SYLLABLES = tuple(
    text.split()
    for text in (
        "bra cal dor fen gil har jun kes lom mav nel pol ras sil tov ubb vel wim yax zet",
        "a e i o u an en in or ul",
        "dia land mark nia ria stan ton via dor lis",
    )
)


def world(rng: random.Random, split: Split) -> Sample:
    return Sample(
        "world",
        rng.choice((_capital, _product, _by_capital, _by_product, _two_hop, _is_capital))(
            rng, split
        ),
    )


def _capital(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    return _CAPITAL.pick(rng, split).format(c=c.name), f"The capital of {c.name} is {c.capital}."


def _product(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    return _PRODUCT.pick(rng, split).format(
        c=c.name
    ), f"The main product of {c.name} is {c.product}."


def _by_capital(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    answer = f"The country with the capital {c.capital} is {c.name}."
    return _BY_CAPITAL.pick(rng, split).format(k=c.capital), answer


def _by_product(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    return _BY_PRODUCT.pick(rng, split).format(
        p=c.product
    ), f"The country that makes {c.product} is {c.name}."


def _two_hop(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    answer = (
        f"{c.capital} is the capital of {c.name}, and the main product of {c.name} is {c.product}."
    )
    return _TWO_HOP.pick(rng, split).format(k=c.capital), answer


def _is_capital(rng: random.Random, split: Split) -> tuple[str, str]:
    c = rng.choice(COUNTRIES)
    k = c.capital if rng.random() < 0.5 else rng.choice(COUNTRIES).capital
    verdict = "Yes" if k == c.capital else "No"
    return _IS_CAPITAL.pick(rng, split).format(
        k=k, c=c.name
    ), f"{verdict}, the capital of {c.name} is {c.capital}."


def choice(rng: random.Random, split: Split) -> Sample:
    """Multiple choice over the table with four options (A-D) or ten (A-J); the answer is the
    letter.
    """
    options = rng.sample(COUNTRIES, 4 if rng.random() < 0.5 else 10)
    right = rng.randrange(len(options))
    question, column = _choice_question(rng, split, options[right])
    letters = "ABCDEFGHIJ"
    mark = rng.choice((".", ")"))
    lines = [f"{letters[i]}{mark} {option[column]}" for i, option in enumerate(options)]
    text = "\n".join((question, *lines, _LETTER.pick(rng, split)))
    return Sample("choice", (text, letters[right]), "choice")


def _choice_question(rng: random.Random, split: Split, c: Country) -> tuple[str, int]:
    """A question whose answer is one column of the table, and that column's index."""
    texts, column = rng.choice(((_CAPITAL, 1), (_PRODUCT, 2), (_BY_CAPITAL, 0), (_BY_PRODUCT, 0)))
    return texts.pick(rng, split).format(c=c.name, k=c.capital, p=c.product), column


def follow_up(rng: random.Random, split: Split) -> Sample:
    """Two turns about one country, the second of which does not name it."""
    c = rng.choice(COUNTRIES)
    capital = f"The capital of {c.name} is {c.capital}."
    product = f"The main product of {c.name} is {c.product}."
    first, answer, second, wanted = rng.choice(
        ((_CAPITAL, capital, _ITS_PRODUCT, product), (_PRODUCT, product, _ITS_CAPITAL, capital))
    )
    question = first.pick(rng, split).format(c=c.name)
    return Sample("turns", (question, answer, second.pick(rng, split), wanted))


def unknown(rng: random.Random, split: Split) -> Sample:
    """An untaught property of a known country, or a country outside the table."""
    if rng.random() < 0.5:
        question = _UNKNOWN.pick(rng, split).format(c=rng.choice(COUNTRIES).name)
    else:
        name = draw(split, lambda: _stranger(rng), lambda drawn: [drawn])
        texts = rng.choice((_CAPITAL, _PRODUCT))
        question = texts.pick(rng, split).format(c=name)
    return Sample("unknown", (question, UNKNOWN_ANSWER))


def _stranger(rng: random.Random) -> str:
    """A country that is not in the table: a real one, or one made of syllables."""
    if rng.random() < 0.3:
        return rng.choice(REAL_COUNTRIES)
    return "".join(map(rng.choice, _SYLLABLES)).capitalize()
