"""The sampler of clauses: fills the forms' slots until a clause says what is wanted.

Clauses come from the forms that the parser reads, so what is written here parses by construction.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from textenv.reviews.grammar import lexicon, words
from textenv.reviews.grammar.forms import SLOTS, Claims, Form
from textenv.reviews.grammar.products import Product


@dataclass(frozen=True)
class ClauseWriter:
    """Words clauses about one product."""

    rng: random.Random
    product: Product

    def clause(self, forms: tuple[Form, ...], topics: tuple[str, ...], sign: int) -> tuple[str, Claims]:
        """A clause about the topics (for overall clauses: none) that praises or blames."""
        while True:
            form = self.rng.choices(forms, [f.weight for f in forms])[0]
            for _ in range(8):
                fill = {slot: self._propose(slot, topics) for slot in form.slots}
                claims = form.meaning(fill)
                if claims and self._wanted(claims, topics, sign):
                    return form.template.format(**fill), claims

    def _wanted(self, claims: Claims, topics: tuple[str, ...], sign: int) -> bool:
        return all(
            claim.value * sign > 0
            and claim.topic in (topics or ("overall",))
            and claim.plural in (None, self.product.plural)
            for claim in claims
        )

    def _propose(self, slot: str, topics: tuple[str, ...]) -> str:
        """A filler for a slot; the form's meaning decides whether it fits with the others."""
        rng, plural = self.rng, self.product.plural
        topic, other = (topics[0], topics[-1]) if topics else ("", "")
        if slot in ("noun", "noun2"):
            return topic if slot == "noun" else other
        if slot == "adj":
            common = other != topic or rng.random() < 0.3
            return rng.choice(_options("generic" if common else slot, topic))
        if slot in ("its_adj", "fact", "overall", "kind_adj"):
            return rng.choice(_options(slot, topic))
        if slot == "verb":
            return lexicon.numbered("seem{s}" if rng.random() < 0.15 else "{is}", rng.random() < 0.5)
        if slot == "product":
            return self.product.name
        if slot == "subject":
            pointer = rng.choice(("the", lexicon.numbered("{this}", plural)))
            return f"{pointer} {self.product.name}" if rng.random() < 0.3 else lexicon.numbered("{it}", plural)
        if slot == "owner":
            return "the" if rng.random() < 0.8 else ("their" if plural else "its")
        if slot == "degree" and rng.random() < 0.5:
            return ""
        return rng.choice(SLOTS[slot])

    def neutral(self) -> str:
        """A sentence that judges nothing, without its capital and its full stop."""
        template = lexicon.numbered(self.rng.choice(words.NEUTRAL), self.product.plural)
        slots = {"person": words.PERSON, "time": words.TIME, "often": words.OFTEN}
        return template.format(product=self.product.name, **{s: self.rng.choice(o) for s, o in slots.items()})


@cache
def _options(slot: str, topic: str) -> list[str]:
    """The grammar's fillers for a slot that depends on the topic."""
    tables: dict[str, Iterable[str]] = {
        "adj": lexicon.OWN_ADJECTIVES.get(topic, ()),
        "generic": lexicon.GENERIC,
        "its_adj": lexicon.ITS_OWN.get(topic, ()),
        "fact": [fact for fact, claim in lexicon.FACTS.items() if claim.topic == topic],
        "overall": lexicon.OVERALL,
        "kind_adj": lexicon.KIND_ADJECTIVES,
    }
    return list(tables[slot]) or [""]
