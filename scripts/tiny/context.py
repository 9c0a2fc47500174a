"""Tasks whose answer stands in the prompt: recalling a fact from a longer text, copying, reversing,
JSON after a schema, and remembering what was said turns ago. Held out are the facts asked for, the
objects made, and wordings.
"""

import json
import random
from typing import NamedTuple

from .sample import ASK, Sample, Split, draw, framed, wordings
from .world import ANIMALS, COLOURS, COUNTRIES, FRUITS, OBJECTS, PEOPLE, PLACES, WORDS

MAX_FACTS = 138  # with filler between them a context of about 1,500 tokens

_NUMBERS = tuple(str(n) for n in range(100, 1000))
_CAPITALS = tuple(c.capital for c in COUNTRIES)
_ATTRIBUTES = {
    "locker code": _NUMBERS,
    "room number": _NUMBERS,
    "lucky number": _NUMBERS,
    "favourite fruit": FRUITS,
    "favourite colour": COLOURS,
    "favourite animal": ANIMALS,
    "home town": _CAPITALS,
}
_ASK_FACT = framed(ASK, ("the {a} of {n}", "{n}'s {a}"))
_ASK_PLACE = wordings(
    "Where is the {n}?",
    "Do you know where the {n} is?",
    "Tell me where the {n} is.",
    "Can you tell me where the {n} is?",
    "In which place is the {n}?",
    "Please tell me where the {n} is.",
    "I need to know where the {n} is.",
)
_INTRO = ("Read this text. ", "Here is a text. ", "Please read. ", "Remember this. ", "")
_REPEAT = wordings(
    "Repeat after me: {x}",
    "Repeat this: {x}",
    "Please repeat: {x}",
    "Please repeat this: {x}",
    "Say this again: {x}",
    "Copy this: {x}",
    "Please copy: {x}",
    "Please copy this: {x}",
)
_REVERSE = wordings(
    "Reverse this list: {x}",
    "Reverse the list: {x}",
    "Please reverse: {x}",
    "Please reverse this list: {x}",
    "Write this list backwards: {x}",
    "Put this list in reverse order: {x}",
)
_JSON = wordings(
    "Make a JSON object for this schema: {schema}\nText: {text}",
    "Write a JSON object that follows this schema: {schema}\nText: {text}",
    "Use this schema: {schema}\nMake a JSON object from this text: {text}",
    "Make a JSON object that follows this schema: {schema}\nText: {text}",
    "Schema: {schema}\nText: {text}\nWrite the JSON object.",
    "Text: {text}\nWrite a JSON object for this schema: {schema}",
    "Schema: {schema}\nText: {text}\nMake the JSON object.",
)


class Fact(NamedTuple):
    """A statement for the text and the answer that repeats it; (attribute, name) is what a question
    can ask.
    """

    attribute: str  # "" for where a thing is
    name: str
    statement: str
    answer: str


def recall(
    rng: random.Random, split: Split, max_facts: int = MAX_FACTS, questions: int = 1
) -> Sample:
    """A text of up to `max_facts` facts and filler, then `questions` about it, one a turn."""
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < questions:
        fact = draw(split, lambda: _fact(rng), lambda drawn: [drawn.answer])
        facts.setdefault(fact[:2], fact)
    asked = list(facts.values())
    for _ in range(rng.randint(min(3, max_facts), max_facts) - questions):
        fact = _fact(rng)
        facts.setdefault(fact[:2], fact)
    statements = [fact.statement for fact in facts.values()]
    filler = rng.random() * 0.5
    statements += [_filler(rng) for _ in range(int(filler * len(statements)))]
    rng.shuffle(statements)
    turns = [text for fact in asked for text in (_question(rng, split, fact), fact.answer)]
    turns[0] = f"{rng.choice(_INTRO)}{' '.join(statements)}\n{turns[0]}"
    return Sample("recall", tuple(turns))


def _fact(rng: random.Random) -> Fact:
    if rng.random() < 0.2:
        name = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
        sentence = f"The {name} is in the {rng.choice(PLACES)}."
        return Fact("", name, sentence, sentence)
    attribute, name = rng.choice(list(_ATTRIBUTES)), rng.choice(PEOPLE)
    value = rng.choice(_ATTRIBUTES[attribute])
    answer = f"The {attribute} of {name} is {value}."
    statement = answer if rng.random() < 0.5 else f"{name} has the {attribute} {value}."
    return Fact(attribute, name, statement, answer)


def _question(rng: random.Random, split: Split, fact: Fact) -> str:
    texts = _ASK_FACT if fact.attribute else _ASK_PLACE
    return texts.pick(rng, split).format(a=fact.attribute, n=fact.name)


def _filler(rng: random.Random) -> str:
    a, b, c = rng.sample(WORDS, 3)
    return rng.choice(
        (f"The {a} is near the {b}.", f"A {a} and a {b} make a {c}.", f"We saw the {a} of the {b}.")
    )


def copy(rng: random.Random, split: Split) -> Sample:
    items = draw(split, lambda: _items(rng, 2, 9), lambda drawn: [drawn])
    text = " ".join(items)
    return Sample("copy", (_REPEAT.pick(rng, split).format(x=text), text))


def reverse(rng: random.Random, split: Split) -> Sample:
    items = draw(split, lambda: _items(rng, 3, 6), lambda drawn: [drawn])
    question = _REVERSE.pick(rng, split).format(x=", ".join(items))
    return Sample("lists", (question, ", ".join(reversed(items))))


def _items(rng: random.Random, low: int, high: int) -> list[str]:
    pool = (*WORDS, *FRUITS, *ANIMALS, *PEOPLE, *_NUMBERS[::5])
    return rng.sample(pool, rng.randint(low, high))


def memory(rng: random.Random, split: Split, between: tuple[str, ...] = ()) -> Sample:
    """What the user said of themselves at the start, asked for after the turns `between`."""
    said, reply, question, answer = draw(split, lambda: _self_fact(rng), lambda drawn: [drawn])
    return Sample("turns", (said, reply, *between, question, answer))


def _self_fact(rng: random.Random) -> tuple[str, str, str, str]:
    name, fruit, town = rng.choice(PEOPLE), rng.choice(FRUITS), rng.choice(_CAPITALS)
    return rng.choice(
        (
            (
                f"My name is {name}.",
                f"Nice to meet you, {name}!",
                "What is my name?",
                f"Your name is {name}.",
            ),
            (
                f"I like the {fruit} best.",
                "I will remember that.",
                "Which fruit do I like best?",
                f"You like the {fruit} best.",
            ),
            (
                f"I live in {town}.",
                "I will remember that.",
                "Where do I live?",
                f"You live in {town}.",
            ),
        )
    )


def json_object(rng: random.Random, split: Split) -> Sample:
    """An object of one to four fields; the text may state more than the schema asks for."""
    stated = draw(split, lambda: _fields(rng), lambda drawn: [sorted(drawn)])
    names = rng.sample(list(stated), rng.randint(1, min(4, len(stated))))
    schema = {
        "type": "object",
        "properties": {name: stated[name][0] for name in names},
        "required": names,
    }
    sentences = [sentence for _, _, sentence in stated.values()]
    rng.shuffle(sentences)
    schema_text = json.dumps(schema)
    texts = _JSON.pick(rng, split)
    question = texts.replace("{schema}", schema_text).replace("{text}", " ".join(sentences))
    answer = json.dumps({name: stated[name][1] for name in names})
    return Sample("json", (question, answer), "json", schema_text)


def _fields(rng: random.Random) -> dict[str, tuple[dict, object, str]]:
    """Field name -> (its schema, its value, the sentence that states it), three to six of them."""
    name, town, colour, animal = map(rng.choice, (PEOPLE, _CAPITALS, COLOURS, ANIMALS))
    age, count, member = rng.randint(1, 99), rng.randint(0, 999), rng.random() < 0.5
    colours = [colour, *rng.sample([c for c in COLOURS if c != colour], 2)]
    rng.shuffle(colours)
    fruits = rng.sample(FRUITS, rng.randint(1, 3))
    string, integer = {"type": "string"}, {"type": "integer"}
    fields: dict[str, tuple[dict, object, str]] = {
        "name": (string, name, f"The name is {name}."),
        "age": (integer, age, f"The age is {age}."),
        "town": (string, town, f"The town is {town}."),
        "count": (integer, count, f"The count is {count}."),
        "animal": (string, animal, f"The animal is a {animal}."),
        "member": ({"type": "boolean"}, member, f"It is {'' if member else 'not '}a member."),
        "colour": ({"type": "string", "enum": colours}, colour, f"The colour is {colour}."),
        "fruits": (
            {"type": "array", "items": string},
            fruits,
            f"The fruits are {' and '.join(fruits)}.",
        ),
    }
    return {key: fields[key] for key in rng.sample(list(fields), rng.randint(3, 6))}
