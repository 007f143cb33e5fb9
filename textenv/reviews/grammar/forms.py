"""Clauses: templates with slots, each with one function that says what a filled template means.

This is the one definition of the grammar's clauses. The sampler fills slots and keeps a fill whose
meaning is the one it wants; the parser turns the same template into a regular expression and asks the
same function. What the function refuses (returns None for) is no clause, however it came about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from textenv.reviews.grammar import lexicon, words
from textenv.reviews.grammar.lexicon import Claim

Fill = Mapping[str, str]
Claims = tuple[Claim, ...]


@dataclass(frozen=True)
class Form:
    """One way to build a clause."""

    template: str
    meaning: Callable[[Fill], Claims | None]
    weight: float = 1.0  # how often the sampler starts with this form

    @cached_property
    def slots(self) -> list[str]:
        """Names of the slots, in order."""
        return re.findall(r"{(\w+)}", self.template)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The template as a regular expression with one named group for each slot."""
        pieces = re.split(r"({\w+})", self.template)
        return re.compile("".join(_slot_pattern(p) if p.startswith("{") else re.escape(p) for p in pieces))

    def parse(self, clause: str) -> Claims | None:
        """What a clause means if it has this form, else None."""
        match = self.pattern.fullmatch(clause)
        return self.meaning(match.groupdict()) if match else None


def _slot_pattern(slot: str) -> str:
    name = slot[1:-1]
    if name not in SLOTS:
        return f"(?P<{name}>[a-zA-Z' ]+)"
    longest_first = sorted(set(SLOTS[name]), key=len, reverse=True)
    return f"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"


def _agrees(number: bool | None, other: bool | None) -> bool:
    return number is None or other is None or number == other


def _said_of_aspect(fill: Fill) -> Claims | None:
    """Meaning of "The lid is very sturdy.", "Its buttons seem a bit stiff."."""
    aspect, verb, owner = fill["noun"], lexicon.VERBS[fill["verb"]], lexicon.OWNERS[fill["owner"]]
    value = lexicon.graded(lexicon.ADJECTIVES[aspect].get(fill["adj"]), fill["degree"])
    if value is None or verb != lexicon.is_plural(aspect):
        return None
    return (Claim(aspect, value, fill["adj"], owner),)


def _denied_of_aspect(fill: Fill) -> Claims | None:
    """Meaning of "The lid is far from sturdy."."""
    aspect, owner = fill["noun"], lexicon.OWNERS[fill["owner"]]
    plural, factor = lexicon.NEGATIONS[fill["negation"]]
    value = lexicon.negated(lexicon.ADJECTIVES[aspect].get(fill["adj"]), factor)
    if value is None or plural != lexicon.is_plural(aspect):
        return None
    return (Claim(aspect, value, fill["adj"], owner),)


def _subject(fill: Fill) -> tuple[bool, str | None]:
    """Number and name of the product that a clause is about."""
    subject = fill["subject"]
    if subject in lexicon.PRONOUNS:
        return lexicon.PRONOUNS[subject], None
    product = lexicon.PRODUCT_SUBJECTS[subject]
    return product.plural, product.name


def _said_of_product(fill: Fill) -> Claims | None:
    """Meaning of "It is really quiet."."""
    plural, product = _subject(fill)
    aspect, adjective = lexicon.ITS_ADJECTIVES.get(fill["its_adj"], ("", None))
    value = lexicon.graded(adjective, fill["degree"])
    if value is None or lexicon.VERBS[fill["verb"]] != plural:
        return None
    return (Claim(aspect, value, fill["its_adj"], plural, product),)


def _denied_of_product(fill: Fill) -> Claims | None:
    """Meaning of "The kettle is not exactly quiet."."""
    plural, product = _subject(fill)
    aspect, adjective = lexicon.ITS_ADJECTIVES.get(fill["its_adj"], ("", None))
    number, factor = lexicon.NEGATIONS[fill["negation"]]
    value = lexicon.negated(adjective, factor)
    if value is None or number != plural:
        return None
    return (Claim(aspect, value, fill["its_adj"], plural, product),)


def _has(fill: Fill) -> Claims | None:
    """Meaning of "It has an awkward handle.", "They have very thick soles."."""
    plural, product = _subject(fill)
    aspect = fill["noun"]
    value = lexicon.graded(lexicon.ATTRIBUTES.get(aspect, {}).get(fill["adj"]), fill["degree"])
    article = "" if lexicon.is_plural(aspect) else lexicon.article(fill["degree"] + fill["adj"])
    degree_fits = fill["degree"].strip() in lexicon.DEGREES_BEFORE_NOUN
    if value is None or fill["article"] != article or lexicon.HAS[fill["has"]] != plural or not degree_fits:
        return None
    return (Claim(aspect, value, fill["adj"], plural, product),)


def _judged(fill: Fill) -> Claims | None:
    """Meaning of "I cannot fault the lid."."""
    aspect, value = fill["noun"], words.JUDGEMENTS[fill["judgement"]]
    return (Claim(aspect, value, fill["judgement"], lexicon.OWNERS[fill["owner"]]),)


def _verdict(fill: Fill) -> Claims | None:
    """Meaning of "The lid could be better."."""
    plural, value = lexicon.VERDICTS[fill["verdict"]]
    if not _agrees(plural, lexicon.is_plural(fill["noun"])):
        return None
    return (Claim(fill["noun"], value, fill["verdict"], lexicon.OWNERS[fill["owner"]]),)


def _wished(fill: Fill) -> Claims | None:
    """Meaning of "I wish the lid was better."."""
    agrees = (fill["were"] == "were") == lexicon.is_plural(fill["noun"])
    return (Claim(fill["noun"], -0.6, "wish", lexicon.OWNERS[fill["owner"]]),) if agrees else None


def _fact(fill: Fill) -> Claims | None:
    """Meaning of "The battery dies before lunch."."""
    return (lexicon.FACTS[fill["fact"]],) if fill["fact"] in lexicon.FACTS else None


def _both(fill: Fill) -> Claims | None:
    """Meaning of "The lid and the price are both great."."""
    first, second = fill["noun"], fill["noun2"]
    value = lexicon.graded(lexicon.GENERIC.get(fill["adj"]), fill["degree"])
    generic = lexicon.is_generic(first) and lexicon.is_generic(second)
    if value is None or first == second or not generic:
        return None
    return (Claim(first, value, fill["adj"]), Claim(second, value, ""))


def _overall(fill: Fill) -> Claims | None:
    """Meaning of "I would buy it again."."""
    return (lexicon.OVERALL[fill["overall"]],) if fill["overall"] in lexicon.OVERALL else None


def _kind(fill: Fill) -> Claims | None:
    """Meaning of "It is a lovely lamp."."""
    product, adjective = lexicon.PRODUCTS[fill["product"]], fill["kind_adj"]
    article = "" if product.plural else lexicon.article(adjective)
    subject, verb = lexicon.POINTERS[fill["pointer"]], lexicon.TENSES[fill["is"]]
    if adjective not in lexicon.KIND_ADJECTIVES or fill["article"] != article:
        return None
    if not subject == verb == product.plural:
        return None
    value = lexicon.KIND_ADJECTIVES[adjective]
    return (Claim("overall", value, adjective, product.plural, product.name),)


def _ranked(fill: Fill) -> Claims | None:
    """Meaning of "This is the best kettle I have owned."."""
    product = lexicon.PRODUCTS[fill["product"]]
    subject, verb = lexicon.POINTERS[fill["pointer"]], lexicon.TENSES[fill["is"]]
    if not subject == verb == product.plural:
        return None
    value = 1.0 if fill["rank"] == "best" else -1.0
    return (Claim("overall", value, fill["rank"], product.plural, product.name),)


# A slot that is not listed here may hold any words; the form's meaning looks them up.
SLOTS: dict[str, tuple[str, ...]] = {
    "owner": tuple(lexicon.OWNERS),
    "noun": tuple(lexicon.ASPECTS),
    "noun2": tuple(lexicon.ASPECTS),
    "verb": tuple(lexicon.VERBS),
    "negation": tuple(lexicon.NEGATIONS),
    "degree": lexicon.DEGREE_SLOT,
    "subject": (*lexicon.PRONOUNS, *lexicon.PRODUCT_SUBJECTS),
    "has": tuple(lexicon.HAS),
    "article": ("a ", "an ", ""),
    "judgement": tuple(words.JUDGEMENTS),
    "were": ("was", "were"),
    "verdict": tuple(lexicon.VERDICTS),
    "pointer": tuple(lexicon.POINTERS),
    "is": tuple(lexicon.TENSES),
    "rank": ("best", "worst"),
    "product": tuple(lexicon.PRODUCTS),
}

ASPECT_FORMS = (
    Form("{fact}", _fact, 3.0),
    Form("{owner} {noun} {verb} {degree}{adj}", _said_of_aspect, 3.0),
    Form("{owner} {noun} {negation} {adj}", _denied_of_aspect, 1.2),
    Form("{subject} {verb} {degree}{its_adj}", _said_of_product, 1.6),
    Form("{subject} {negation} {its_adj}", _denied_of_product, 1.0),
    Form("{subject} {has} {article}{degree}{adj} {noun}", _has, 0.9),
    Form("{judgement} {owner} {noun}", _judged, 1.0),
    Form("{owner} {noun} {verdict}", _verdict, 1.0),
    Form("I wish {owner} {noun} {were} better", _wished, 0.3),
)
PAIR_FORMS = (Form("the {noun} and the {noun2} are both {degree}{adj}", _both),)
OVERALL_FORMS = (
    Form("{overall}", _overall, 3.0),
    Form("{pointer} {is} {article}{kind_adj} {product}", _kind, 1.0),
    Form("{pointer} {is} the {rank} {product} I have owned", _ranked, 0.5),
)
