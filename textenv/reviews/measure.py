"""The gold rater's preferences, and the figures of the model card."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from textenv.models.encoding import encode
from textenv.reviews.gold import gold
from textenv.reviews.grammar.parser import parses
from textenv.reviews.sampling import Sample
from textenv.training.preferences import Pair, Pairs

SURE = 0.9  # a choice that the noisy rater makes with at least this probability is called sure


class Comparison(NamedTuple):
    """The rater's noisy choice between two responses to one prompt."""

    chosen: Sample
    rejected: Sample
    margin: float  # gold score of the chosen minus that of the rejected response; negative if noise decided


def compare(pairs: Sequence[tuple[Sample, Sample]], noise: float, seed: int) -> list[Comparison]:
    """The rater's choices (Bradley–Terry): the first of a pair with probability sigmoid(gold difference / noise)."""
    rng = random.Random(seed)
    firsts, seconds = (_gold([pair[side] for pair in pairs]) for side in (0, 1))
    choices = []
    for (first, second), high, low in zip(pairs, firsts, seconds, strict=True):
        if rng.random() < 1 / (1 + math.exp(-(high - low) / noise)):
            choices.append(Comparison(first, second, high - low))
        else:
            choices.append(Comparison(second, first, low - high))
    return choices


def _gold(samples: Sequence[Sample]) -> list[float]:
    return gold([s.prompt for s in samples], [s.text for s in samples])


def as_pairs(tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]) -> Pairs:
    """Comparisons as token pairs. The tokens are those sampled, so a response cut by the budget has no end token."""
    prompts = encode(tokenizer, [c.chosen.prompt for c in comparisons])
    return Pairs(
        [
            Pair([*ids, *c.chosen.tokens], [*ids, *c.rejected.tokens])
            for ids, c in zip(prompts, comparisons, strict=True)
        ]
    )


def measure_supervised(samples: Sequence[Sample]) -> dict[str, float]:
    """Figures of samples: their number, the share that parses, lengths and gold scores."""
    scores = _gold(samples)
    return {
        "samples": len(samples),
        "parsing": statistics.mean(s.finished and parses(s.text) for s in samples),
        "finished": statistics.mean(s.finished for s in samples),
        "tokens_mean": statistics.mean(len(s.tokens) for s in samples),
        "gold_mean": statistics.mean(scores),
        "gold_deviation": statistics.pstdev(scores),
        "distinct": len({s.text for s in samples}) / len(samples),
    }


def measure_reward_model(choices: Sequence[Comparison], scores: Sequence[float], noise: float) -> dict[str, float]:
    """The reward model's agreement with the rater on held-out pairs.

    scores: the reward model's, of all chosen and then of all rejected responses.
    """
    count = len(choices)
    score_margins = [scores[i] - scores[count + i] for i in range(count)]
    margins = [c.margin for c in choices]
    differing = [(score_margin, margin) for score_margin, margin in zip(score_margins, margins, strict=True) if margin]
    least = noise * math.log(SURE / (1 - SURE))
    sure = [score_margin * margin > 0 for score_margin, margin in differing if abs(margin) >= least]
    golds = _gold([c.chosen for c in choices] + [c.rejected for c in choices])
    return {
        "test_pairs": count,
        "accuracy_noisy": statistics.mean(score_margin > 0 for score_margin in score_margins),
        "accuracy_true": statistics.mean(score_margin * margin > 0 for score_margin, margin in differing),
        "ceiling": statistics.mean(margin > 0 for margin in margins if margin),
        "ceiling_expected": statistics.mean(1 / (1 + math.exp(-abs(margin) / noise)) for margin in margins),
        "sure_pairs": len(sure),
        "accuracy_sure": statistics.mean(sure),
        "correlation": statistics.correlation(scores, golds),
        "score_mean": statistics.mean(scores),
        "score_deviation": statistics.pstdev(scores),
    }
