"""The closed world that ernie-tiny knows: a made-up table of countries, and the tasks' word lists.

Nothing here is true of the real world, so an answer can only come from training. Never draw at
random in this file: the table is the same for every seed.
"""

from typing import NamedTuple


class Country(NamedTuple):
    """One row of the table; each column is unique, so questions can be asked in both directions."""

    name: str
    capital: str
    product: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TABLE = """
Adoria Krando nuts; Belmark Holmar pepper; Castria Melda carpets; Dravina Kolda jam;
Elonia Norsil olives; Fermora Dorvo maps; Galdia Jolmen coffee; Hestan Wexlo eggs;
Irvania Ostrel bricks; Jorland Yalmo honey; Kelvia Hulvik dates; Lunara Elmar amber;
Mirovia Lemnor kites; Nordavia Mastel candles; Orsten Nimra pearls; Paldia Gravik silk;
Quorra Sendra lamps; Rivonia Ilsen paper; Sarvia Lorvik gloves; Tolmar Corlo salt;
Ulvia Istra ink; Vestria Grenla copper; Wendor Umbrel tea; Xandia Xelan clocks;
Yorvia Bastil cotton; Zembria Cendra rice; Astora Zorvik flutes; Bravia Jarvo quilts;
Cordia Dunvar bells; Delmara Arvik cheese; Ervania Parvik wheat; Faldora Estil boots;
Gorvia Brenla soap; Halmark Varno vases; Isolda Talvik barley; Juvania Ferrin figs;
Kordan Quenlo butter; Lestria Fostel glass; Morvia Albren umbrellas; Navora Rostil wool
"""

COUNTRIES = tuple(Country(*row.split()) for row in _TABLE.split(";"))

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    """January February March April May June
    July August September October November December"""
)
MONTH_LENGTHS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
)

PEOPLE = _words(
    """Mara Olmo Tessa Bruno Nadia Felix Greta Hugo Ines Jonas Karla Leo Mina Nils Olga Pavel Rosa
    Sven Tilda Ursula Viktor Wanda Yara Zeno Anton Berta Carlo Dora Emil Frida Gustav Helga Ivo
    Judit Kurt Lena Marco Nora Oskar Petra"""
)
FRUITS = _words("apple pear plum peach cherry banana lemon mango melon grape orange apricot")
ANIMALS = _words("cat dog horse rabbit parrot turtle hamster goat duck goose sheep pony snake")
COLOURS = _words("red blue green yellow black white brown purple pink grey orange silver")
PLACES = _words(
    "kitchen garden cellar attic garage library workshop bathroom hallway balcony office barn"
)
OBJECTS = _words(
    """key lamp book ladder basket hammer mirror bottle pencil blanket bucket candle drum chair
    clock ticket scarf wallet violin kettle"""
)
WORDS = _words(
    """river mountain window bridge market forest island summer winter spring autumn morning evening
    school letter number paper table door floor wall roof street village city harbour boat train
    wagon wheel engine rocket planet star moon cloud storm thunder rain snow wind fire water stone
    sand grass tree leaf flower root seed bread butter sugar honey salt pepper soup dinner lunch
    spoon fork knife plate cup glass button needle thread shirt coat hat shoe glove ring crown
    castle tower king queen knight doctor teacher farmer baker painter singer dancer writer driver
    sailor pilot hunter friend mother father sister brother child baby uncle cousin dream story song
    dance game ball kite doll puzzle picture colour circle square corner line point page word answer
    question reason secret promise present silver golden quiet gentle brave clever happy simple
    little heavy light strong early late"""
)

REAL_COUNTRIES = _words(
    """France Japan Brazil Canada Egypt India Kenya Mexico Norway Peru Poland Spain Sweden Turkey
    Vietnam Chile Greece Italy Austria Cuba"""
)
UNTAUGHT = (  # noun phrases about a country that no text of the world answers
    "the king of {c}",
    "the queen of {c}",
    "the president of {c}",
    "the population of {c}",
    "the longest river in {c}",
    "the highest mountain in {c}",
    "the national animal of {c}",
    "the flag of {c}",
    "the language of {c}",
    "the oldest bridge in {c}",
    "the largest lake in {c}",
    "the history of {c}",
)
