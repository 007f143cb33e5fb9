"""From text to what it says: sentences, clauses and claims, under the grammar of `forms` and `words`.

Text is parsed sentence by sentence. A sentence either follows the grammar and yields claims, or it does
not and yields None; nothing is guessed from single words.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import NamedTuple

from textenv.reviews.grammar import lexicon, words
from textenv.reviews.grammar.forms import ASPECT_FORMS, OVERALL_FORMS, PAIR_FORMS, Claims, Form

_SENTENCE = re.compile(r"[^.!]+[.!](?= |$)|[^.!]+$|[.!]+")
_LINK = re.compile("|".join(map(re.escape, sorted(words.LINKS, key=len, reverse=True))))
_NOUN = "|".join(sorted(lexicon.ASPECTS, key=len, reverse=True))
_EXCEPTION = re.compile(rf"({'|'.join(words.EXCEPTIONS)}) the ({_NOUN})")
_TURNS = tuple(f"{turn}," for turn in words.TURNS)
_FORMS = (*PAIR_FORMS, *ASPECT_FORMS, *OVERALL_FORMS)


class Sentence(NamedTuple):
    """One sentence of a text."""

    text: str
    claims: Claims | None  # None: not a sentence of the grammar; empty: one that judges nothing
    finished: bool  # ends with "." or "!"


def parse_text(text: str) -> list[Sentence]:
    """The sentences of a text, in order. One space comes before each; one before the first is optional."""
    sentences = []
    for index, match in enumerate(_SENTENCE.finditer(text)):
        raw = match.group()
        finished = raw[-1] in ".!"
        spaced = raw.startswith(" ") or index == 0
        stripped = raw.removeprefix(" ")
        opens_with_turn = index == 0 and stripped.lower().startswith(_TURNS)
        claims = parse_sentence(stripped[:-1]) if finished and spaced and not opens_with_turn else None
        if stripped.strip():
            sentences.append(Sentence(stripped, claims, finished))
    return sentences


def parses(text: str) -> bool:
    """Whether a text is one or more finished sentences of the grammar and nothing else."""
    sentences = parse_text(text)
    return bool(sentences) and not text.endswith(" ") and all(s.claims is not None for s in sentences)


@lru_cache(maxsize=100_000)
def parse_sentence(sentence: str) -> Claims | None:
    """Claims of a sentence without its full stop; None if the grammar does not have it."""
    if not sentence[:1].isupper():
        return None
    body = sentence if re.match(r"I\b", sentence) else sentence[0].lower() + sentence[1:]
    if neutral(body):
        return ()
    intro, comma, rest = body.partition(", ")
    if comma and intro in words.INTROS:
        claims = _joined(rest)
        wanted = words.INTROS[intro]
        return claims if claims and wanted * claims[0].value >= 0 else None
    if comma and (exception := _EXCEPTION.fullmatch(intro)):
        return _excepted(exception, rest)
    for concession in words.CONCESSIONS:
        if comma and intro.startswith(f"{concession} "):
            return _conceded(_hedged(intro.removeprefix(f"{concession} ")), _hedged(rest))
    return _joined(body)


def _excepted(exception: re.Match[str], rest: str) -> Claims | None:
    claims = _clause(rest, OVERALL_FORMS)
    if not claims:
        return None
    blame = -words.EXCEPTIONS[exception[1]] * (1 if claims[0].value > 0 else -1)
    return (lexicon.Claim(exception[2], blame, exception[1]), *claims)


def _conceded(first: Claims | None, second: Claims | None) -> Claims | None:
    """Claims of "although A, B": A's weigh less."""
    if not first or not second or first[0].value * second[0].value >= 0:
        return None
    return (*(c._replace(value=words.CONCEDED * c.value) for c in first), *second)


def _joined(body: str) -> Claims | None:
    """Claims of a clause, or of two clauses with a link between."""
    if claims := _hedged(body):
        return claims
    for link, order in ((words.REASON, 1), (words.RESULT, -1)):
        if link in body:
            overall, aspect = body.split(link, 1)[::order]
            return _agreeing(_clause(overall, OVERALL_FORMS), _clause(aspect, ASPECT_FORMS), order)
    for match in _LINK.finditer(body):
        first, second = _hedged(body[: match.start()]), _hedged(body[match.end() :])
        if not first or not second:
            continue
        return _conceded(first, second) if words.LINKS[match.group()] < 0 else (*first, *second)
    return None


def _agreeing(first: Claims | None, second: Claims | None, order: int) -> Claims | None:
    if not first or not second or first[0].value * second[0].value <= 0:
        return None
    return (*first, *second)[::order] if order > 0 else (*second, *first)


def _hedged(clause: str) -> Claims | None:
    """Claims of one clause, with or without "I think" or "I cannot say that" before it."""
    if clause.startswith(f"{words.DENIAL} "):
        claims = _clause(clause.removeprefix(f"{words.DENIAL} "), ASPECT_FORMS)
        if not claims or claims[0].value <= 0:
            return None
        return tuple(c._replace(value=words.DENIAL_FACTOR * c.value) for c in claims)
    for hedge, factor in words.HEDGES.items():
        if clause.startswith(f"{hedge} "):
            claims = _clause(clause.removeprefix(f"{hedge} "), ASPECT_FORMS)
            return claims and tuple(c._replace(value=factor * c.value) for c in claims)
    return _clause(clause, _FORMS)


@lru_cache(maxsize=100_000)
def _clause(clause: str, forms: tuple[Form, ...]) -> Claims | None:
    for form in forms:
        if claims := form.parse(clause):
            return claims
    return None


@cache
def _neutral_patterns() -> list[re.Pattern[str]]:
    return [re.compile(_neutral_pattern(template, plural)) for template in words.NEUTRAL for plural in (False, True)]


def _neutral_pattern(template: str, plural: bool) -> str:
    names = [p.name for p in lexicon.PRODUCTS.values() if p.plural == plural]
    slots = {"product": names, "person": words.PERSON, "time": words.TIME, "often": words.OFTEN}
    text = lexicon.numbered(template, plural)
    return re.sub(r"{(\w+)}", lambda slot: f"(?:{'|'.join(map(re.escape, slots[slot[1]]))})", text)


def neutral(body: str) -> bool:
    """Whether a sentence tells a fact of the grammar and judges nothing."""
    return any(pattern.fullmatch(body) for pattern in _neutral_patterns())
