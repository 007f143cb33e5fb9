"""Tables looked up by the grammar and its parser, worked out from the data of aspects, products, words."""

from __future__ import annotations

import re
from typing import NamedTuple

from textenv.reviews.grammar import words
from textenv.reviews.grammar.aspects import ASPECTS
from textenv.reviews.grammar.products import PRODUCTS

_NUMBERED = {  # placeholder -> (singular, plural)
    "it": ("it", "they"),
    "them": ("it", "them"),
    "this": ("this", "these"),
    "s": ("s", ""),
    "es": ("es", ""),
    "is": ("is", "are"),
    "was": ("was", "were"),
    "has": ("has", "have"),
}


class Claim(NamedTuple):
    """What a clause says."""

    topic: str  # an aspect, or "overall"
    value: float  # from -1 to 1
    word: str = ""  # the adjective or phrase that carries the value
    plural: bool | None = None  # number of the product, where the clause shows it
    product: str | None = None  # the product, where the clause names it


class Adjective(NamedTuple):
    """How an adjective behaves and what it is worth."""

    kind: str  # "" gradable, "!" extreme, "~" mild, "=" fixed
    value: float


def numbered(phrase: str, plural: bool) -> str:
    """Fill the placeholders that follow a number."""
    return re.sub(r"{(\w+)}", lambda m: _NUMBERED[m[1]][plural] if m[1] in _NUMBERED else m[0], phrase)


def shows_number(phrase: str) -> bool:
    """Whether singular and plural of a phrase differ."""
    return numbered(phrase, False) != numbered(phrase, True)


def article(phrase: str) -> str:
    """The indefinite article that goes before a phrase, with its space."""
    return "an " if phrase[0] in "aeiou" and not phrase.startswith("use") else "a "


def is_plural(aspect: str) -> bool:
    """Whether an aspect's noun is plural."""
    return ASPECTS[aspect].plural


def is_generic(aspect: str) -> bool:
    """Whether "good", "terrible" and the like fit an aspect's noun."""
    return ASPECTS[aspect].generic


def graded(adjective: Adjective | None, degree: str) -> float | None:
    """Value of an adjective after a degree word ("very "), None if the two do not go together."""
    if adjective is None:
        return None
    degree = degree.strip()
    if not degree:
        return adjective.value
    table = {"": words.DEGREES, "!": words.EXTREME_DEGREES}.get(adjective.kind, {})
    if adjective.kind == "" and adjective.value < 0:
        table = {**table, **words.BAD_DEGREES}
    return adjective.value * table[degree] if degree in table else None


def negated(adjective: Adjective | None, factor: float) -> float | None:
    """Value of a denied adjective: the sign turns, and the force fades by the factor."""
    if adjective is None or adjective.kind:
        return None
    return -adjective.value * factor


def _adjectives(good: str, bad: str) -> dict[str, Adjective]:
    strength = {"": words.PLAIN, "!": words.EXTREME, "~": words.MILD, "=": words.FIXED}
    table = {}
    for sign, listed in ((1, good), (-1, bad)):
        for entry in filter(None, listed.split(", ")):
            kind = entry[0] if entry[0] in "!~=" else ""
            table[entry.lstrip("!~=")] = Adjective(kind, sign * strength[kind])
    return table


GENERIC = _adjectives(words.GENERIC_GOOD, words.GENERIC_BAD)
OWN_ADJECTIVES = {name: _adjectives(a.good, a.bad) for name, a in ASPECTS.items()}
ADJECTIVES = {name: {**own, **(GENERIC if ASPECTS[name].generic else {})} for name, own in OWN_ADJECTIVES.items()}
ATTRIBUTES = {  # adjectives that stand before the noun: "a sturdy lid", never "an easy to press buttons"
    name: {word: adj for word, adj in table.items() if " " not in word and adj.kind in ("", "!")}
    for name, table in ADJECTIVES.items()
    if ASPECTS[name].part
}
ITS_OWN = {name: _adjectives(a.its_good, a.its_bad) for name, a in ASPECTS.items()}
# Said of a product, a word must point to one aspect; the first aspect that claims it keeps it.
ITS_ADJECTIVES: dict[str, tuple[str, Adjective]] = {}
for _name, _table in ITS_OWN.items():
    for _word, _adjective in _table.items():
        ITS_ADJECTIVES.setdefault(_word, (_name, _adjective))

DEGREE_SLOT = ("", *(f"{d} " for d in {**words.DEGREES, **words.BAD_DEGREES, **words.EXTREME_DEGREES}))
DEGREES_BEFORE_NOUN = ("", "very", "really", "pretty", "fairly", "surprisingly", "rather")
OWNERS: dict[str, bool | None] = {"the": None, "its": False, "their": True}
PRONOUNS = {"it": False, "they": True}
POINTERS = {"it": False, "this": False, "they": True, "these": True}
HAS = {"has": False, "have": True}
TENSES = {"is": False, "are": True}
PRODUCT_SUBJECTS = {
    f"{word} {p.name}": p for p in PRODUCTS.values() for word in ("the", "these" if p.plural else "this")
}
VERBS = {numbered(verb, plural): plural for verb in words.VERBS for plural in (False, True)}
NEGATIONS = {numbered(n, plural): (plural, f) for n, f in words.NEGATIONS.items() for plural in (False, True)}
VERDICTS = {
    numbered(verdict, plural): (plural if shows_number(verdict) else None, value)
    for verdict, value in words.VERDICTS.items()
    for plural in (False, True)
}
KIND_ADJECTIVES = dict.fromkeys(words.OVERALL_GOOD.split(", "), 0.9)
KIND_ADJECTIVES |= dict.fromkeys(words.OVERALL_BAD.split(", "), -0.9)
FACT_VALUE = 0.8


def _facts() -> dict[str, Claim]:
    facts = {}
    for name, aspect in ASPECTS.items():
        for value, listed in ((FACT_VALUE, aspect.good_facts), (-FACT_VALUE, aspect.bad_facts)):
            for fact in listed.split("; "):
                for plural in (False, True):
                    number = plural if shows_number(fact) else None
                    facts[numbered(fact, plural)] = Claim(name, value, fact, number)
    return facts


def _overall() -> dict[str, Claim]:
    return {
        numbered(phrase, plural): Claim("overall", value, phrase, plural if shows_number(phrase) else None)
        for phrase, value in words.OVERALL.items()
        for plural in (False, True)
    }


FACTS = _facts()
OVERALL = _overall()
