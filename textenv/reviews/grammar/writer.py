"""The sampler of the grammar: writes a review for a product and the aspects that a prompt asks about.

A review is planned first (its leaning, the aspects it covers, the sign of what it says of each) and
then worded, sentence by sentence. Every sentence has a shape that `parser` reads.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from textenv.reviews.grammar import lexicon, words
from textenv.reviews.grammar.clauses import ClauseWriter
from textenv.reviews.grammar.forms import ASPECT_FORMS, OVERALL_FORMS, PAIR_FORMS
from textenv.reviews.grammar.products import PRODUCTS
from textenv.reviews.prompts import parse_prompt

MAX_SENTENCES = 4
MAX_WORDS = 40  # words and marks; keeps reviews within the token budget of the task


class Point(NamedTuple):
    """Something to say: praise (+1) or blame (-1) of an aspect."""

    aspect: str
    sign: int


class Plan(NamedTuple):
    """What a review is going to say."""

    points: list[Point]
    overall: int  # sign of the words on the product as a whole; 0: none
    opening: bool  # whether a sentence that judges nothing comes first


def sample_review(prompt: str, rng: random.Random) -> str:
    """One review for a prompt, in the style of the corpus: not always on topic, good and bad alike."""
    request = parse_prompt(prompt)
    writer = ClauseWriter(rng, PRODUCTS[request.product])
    while True:
        sentences = _write(writer, _plan(request.aspects, writer))
        text = " ".join(sentences)
        words_and_marks = len(text.split()) + sum(text.count(mark) for mark in ".,!'")
        if len(sentences) <= MAX_SENTENCES and words_and_marks <= MAX_WORDS and len(set(sentences)) == len(sentences):
            return text


def _plan(asked: tuple[str, ...], writer: ClauseWriter) -> Plan:
    rng = writer.rng
    leaning = rng.choices((0.9, 0.1, 0.5), (0.42, 0.42, 0.16))[0]  # chance that a point is praise
    covered = [aspect for aspect in asked if rng.random() < 0.82] or [rng.choice(asked)]
    if rng.random() < 0.3:
        covered += [rng.choice([a for a in writer.product.aspects if a not in asked])]
    if rng.random() < 0.06:
        covered += [rng.choice(covered)]  # people do repeat themselves
    signs = {aspect: 1 if rng.random() < leaning else -1 for aspect in covered}
    rng.shuffle(covered)
    balance = sum(signs.values()) or rng.choice((1, -1))
    overall = (1 if balance > 0 else -1) if rng.random() < 0.45 else 0
    return Plan([Point(a, signs[a]) for a in covered], overall, rng.random() < 0.22)


def _write(writer: ClauseWriter, plan: Plan) -> list[str]:
    rng, points, sentences = writer.rng, list(plan.points), []
    overall, before = plan.overall, 0
    if overall and rng.random() < 0.35:
        sentences.append(_overall_with_point(writer, points, overall))
        before, overall = overall, 0
    while points:
        first = points.pop(0)
        if points and points[0].aspect != first.aspect and rng.random() < 0.6:
            second = points.pop(0)
            sentences.append(_two_points(writer, first, second))
            before = second.sign
        else:
            sentences.append(_one_point(writer, first, before))
            before = first.sign
    if overall:
        sentence = _clause(writer, None, overall)
        last = rng.random() < 0.7
        if last and rng.random() < 0.3:
            sentence = f"{rng.choice(words.SUMS)}, {sentence}"
        sentences.insert(len(sentences) if last else 0, sentence)
    if plan.opening:
        sentences.insert(0, writer.neutral())
    marks = [_mark(rng, calm=plan.opening and index == 0) for index in range(len(sentences))]
    return [_capital(sentence) + mark for sentence, mark in zip(sentences, marks, strict=True)]


def _clause(writer: ClauseWriter, aspect: str | None, sign: int) -> str:
    if aspect is None:
        return writer.clause(OVERALL_FORMS, (), sign)[0]
    return writer.clause(ASPECT_FORMS, (aspect,), sign)[0]


def _one_point(writer: ClauseWriter, point: Point, before: int) -> str:
    """A sentence on one point; `before` is the sign of the sentence before it."""
    rng = writer.rng
    if rng.random() < 0.12:
        if point.sign < 0 and rng.random() < 0.5:
            return f"{words.DENIAL} {_praise_to_deny(writer, point.aspect)}"
        return f"{rng.choice(list(words.HEDGES))} {_plain_clause(writer, point)}"
    if rng.random() < 0.07:
        return f"{rng.choice(words.STATES)}, {_plain_clause(writer, point)}"
    return _introduced(rng, _clause(writer, point.aspect, point.sign), point.sign, before)


def _plain_clause(writer: ClauseWriter, point: Point) -> str:
    """A clause that reads well after "I think"."""
    return writer.clause(_PLAIN, (point.aspect,), point.sign)[0]


def _praise_to_deny(writer: ClauseWriter, aspect: str) -> str:
    """A clause that reads well after "I cannot say that": praise without "surprisingly" or "quite"."""
    while True:
        clause = writer.clause(_DENIABLE, (aspect,), 1)[0]
        if not any(f" {degree} " in clause for degree in _UNDENIED):
            return clause


def _introduced(rng: random.Random, clause: str, sign: int, before: int) -> str:
    """The clause, sometimes with an intro that fits its sign and the sign of the sentence before it."""
    if before * sign < 0 and rng.random() < 0.5:
        return f"{rng.choice(words.TURNS)}, {clause}"
    if rng.random() >= 0.18:
        return clause
    special = {*words.TURNS, *words.STATES, *words.SUMS}
    fitting = [i for i, wanted in words.INTROS.items() if wanted * sign >= 0 and i not in special]
    return f"{rng.choice(fitting)}, {clause}"


def _two_points(writer: ClauseWriter, first: Point, second: Point) -> str:
    rng = writer.rng
    generic = lexicon.is_generic(first.aspect) and lexicon.is_generic(second.aspect)
    if first.sign == second.sign and generic and rng.random() < 0.2:
        return writer.clause(PAIR_FORMS, (first.aspect, second.aspect), first.sign)[0]
    one, two = (_clause(writer, p.aspect, p.sign) for p in (first, second))
    if first.sign != second.sign and rng.random() < 0.3:
        return f"{rng.choice(words.CONCESSIONS)} {one}, {two}"
    links = [link for link, product in words.LINKS.items() if product == first.sign * second.sign]
    return f"{one}{rng.choice(links)}{two}"


def _overall_with_point(writer: ClauseWriter, points: list[Point], sign: int) -> str:
    """The overall word in one sentence with a point that explains it or is its exception."""
    rng, point = writer.rng, points.pop(0)
    overall = _clause(writer, None, sign)
    if point.sign != sign:
        return f"{_exception(point)} the {point.aspect}, {overall}"
    clause = writer.clause(_REASONS, (point.aspect,), point.sign)[0]
    if rng.random() < 0.5:
        return f"{overall}{words.REASON}{clause}"
    return f"{clause}{words.RESULT}{overall}"


def _exception(point: Point) -> str:
    return "despite" if point.sign < 0 else "apart from"


def _mark(rng: random.Random, calm: bool) -> str:
    return "!" if not calm and rng.random() < 0.05 else "."


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


_PLAIN = tuple(form for form in ASPECT_FORMS if form.template.startswith(("{owner} {noun}", "{subject}")))
_REASONS = tuple(form for form in ASPECT_FORMS if not form.template.startswith(("{judgement}", "I wish")))
_UNDENIED = ("surprisingly", "quite", "pretty", "fairly", "so", "really", "absolutely", "simply")
_DENIABLE = tuple(form for form in _PLAIN if "{adj}" in form.template and "{negation}" not in form.template)
