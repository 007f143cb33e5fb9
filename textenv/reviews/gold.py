"""The gold rater: the true quality of any text as a review for a prompt, a sum of parts.

It reads the claims of a text with the grammar's parser and ignores single words. So praise earns nothing if it is not
a sentence of the grammar, is about something else, or repeats an earlier claim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from textenv.reviews.grammar.lexicon import PRODUCTS, Claim
from textenv.reviews.grammar.parser import Sentence, parse_text
from textenv.reviews.prompts import Request, parse_prompt

LOWEST, HIGHEST = -4.0, 4.0
OVERALL_WEIGHT = 0.5  # of claims about the product as a whole; each requested aspect weighs 1
LONGEST = 4  # sentences; more is rambling


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The parts of a rating. Their sum, clipped to [-4, 4], is the gold score."""

    sentiment: float  # -2 to 2: twice the mean value over the requested aspects and the product as a whole
    coverage: float  # 0 to 1.5: by the share of requested aspects that the text mentions
    off_topic: float  # -0.5 for each claim about another aspect or product, at most -1.5
    form: float  # 0.5 if every sentence parses, else -2 times the share of sentences that do not
    repetition: float  # -0.5 for each repeated sentence, aspect or evaluative word, at most -3
    rambling: float  # -0.5 for each sentence beyond the fourth, at most -2
    unfinished: float  # -1 if the text breaks off

    @property
    def total(self) -> float:
        """The gold score."""
        total = sum(getattr(self, field.name) for field in fields(self))
        return max(LOWEST, min(HIGHEST, total))


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """True quality of each response to its prompt, from -4 to 4."""
    if len(prompts) != len(responses):
        raise ValueError(
            f"gold needs one prompt for each response; got {len(prompts)} prompts and "
            f"{len(responses)} responses. Repeat a prompt for each of its responses."
        )
    return [rate(prompt, response).total for prompt, response in zip(prompts, responses, strict=True)]


def rate(prompt: str, response: str) -> Quality:
    """The parts of one response's rating."""
    request = parse_prompt(prompt)
    sentences = parse_text(response)
    claims = [claim for sentence in sentences for claim in sentence.claims or ()]
    on_product = [claim for claim in claims if _is_about(claim, request.product)]
    off_topic = sum(c.topic not in (*request.aspects, "overall") or not _is_about(c, request.product) for c in claims)
    return Quality(
        sentiment=_sentiment(request, on_product),
        coverage=1.5 * sum(any(c.topic == a for c in on_product) for a in request.aspects) / len(request.aspects),
        off_topic=-min(0.5 * off_topic, 1.5),
        form=_form(sentences),
        repetition=-min(0.5 * _repeats(sentences, claims), 3.0),
        rambling=-min(0.5 * max(0, len(sentences) - LONGEST), 2.0),
        unfinished=0.0 if sentences and sentences[-1].finished else -1.0,
    )


def _is_about(claim: Claim, product: str) -> bool:
    return claim.product in (None, product) and claim.plural in (None, PRODUCTS[product].plural)


def _sentiment(request: Request, claims: list[Claim]) -> float:
    """Twice the weighted mean value. An aspect that is not mentioned counts as 0; contradictions cancel."""
    total, weight = 0.0, 0.0
    for topic in (*request.aspects, "overall"):
        values = [claim.value for claim in claims if claim.topic == topic]
        if topic == "overall" and not values:
            continue
        topic_weight = OVERALL_WEIGHT if topic == "overall" else 1.0
        weight += topic_weight
        if values:
            total += topic_weight * max(-1.0, min(1.0, sum(values) / len(values)))
    return 2.0 * total / weight


def _form(sentences: list[Sentence]) -> float:
    if not sentences:
        return -2.0
    bad = sum(sentence.claims is None for sentence in sentences)
    return -2.0 * bad / len(sentences) if bad else 0.5


def _repeats(sentences: list[Sentence], claims: list[Claim]) -> int:
    """The number of repeated sentences, topics and evaluative words."""
    lists = (
        [sentence.text.rstrip(".!") for sentence in sentences],
        [claim.topic for claim in claims],
        [claim.word for claim in claims if claim.word],
    )
    return sum(len(entries) - len(set(entries)) for entries in lists)
