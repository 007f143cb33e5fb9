"""Alarms: what in the metrics of a run on text deserves a look, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

FEWEST = 6  # iterations before anything is said
SURE = 4.0  # standard errors beyond which a change counts
LARGE = 0.1  # and standard deviations of the score, of a change of score or gold
# What is left of a number when it has collapsed: its share of the start, and its unit.
COLLAPSES = {
    "length": (0.5, "The responses collapse: their length fell", "tokens", "Look at how they end."),
    "distinct_bigrams": (
        0.35,  # a usual run on one kind of prompts ends at half
        "The responses repeat themselves: the share of distinct word pairs fell",
        "",
        "Many prompts get one response; read a few.",
    ),
    "entropy": (
        0.3,
        "The entropy collapses: it fell",
        "nats a token",
        "The policy hardly explores any more; raise kl_coef, or lower learning_rate.",
    ),
}


def find_alarms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What deserves a look, a sentence or two each. rows: metrics by iteration; those of other than text say nothing.

    Gold that falls while the score rises (Gao et al. 2023), and collapses of length, diversity and entropy. Series are
    compared by means over a sixth of the run, and by their own noise from one iteration to the next.
    """
    if not any("score" in row for row in rows):
        return []
    found = [_overoptimized(rows), *(_collapsed(rows, name, *words) for name, words in COLLAPSES.items())]
    return [alarm for alarm in found if alarm is not None]


def _overoptimized(rows: Sequence[Mapping[str, Any]]) -> str | None:
    both = [row for row in rows if _is_number(row.get("score")) and _is_number(row.get("gold"))]
    if len(both) < FEWEST:
        return None
    raw = all(_is_number(row.get("score/raw")) for row in both)  # before normalization, as gold is
    score, gold = [row["score/raw" if raw else "score"] for row in both], [row["gold"] for row in both]
    width = window(len(both))
    means, after = _moving(gold, width), _moving(score, width)
    best = max(range(len(means)), key=means.__getitem__)
    least = 0.0 if raw else LARGE * _mean([row.get("score_std", 0.0) for row in both])
    fell, rose = means[best] - means[-1], after[-1] - after[best]
    if fell <= max(SURE * _error(gold, width), least) or rose <= max(SURE * _error(score, width), least):
        return None
    since = both[best + width // 2]["iteration"]
    return (
        f"Gold falls while the score rises: since about iteration {since} the score went from {after[best]:+.2f} to "
        f"{after[-1]:+.2f}, and gold from {means[best]:+.2f} to {means[-1]:+.2f}. The policy exploits the reward; stop "
        "earlier, or raise kl_coef."
    )


def _collapsed(
    rows: Sequence[Mapping[str, Any]], name: str, share: float, words: str, unit: str, remedy: str
) -> str | None:
    values = [row[name] for row in rows if _is_number(row.get(name))]
    if len(values) < FEWEST:
        return None
    width = window(len(values))
    means = _moving(values, width)
    if not means[0] > 0 or means[-1] > share * means[0]:
        return None
    unit = f" {unit}" if unit else ""
    return f"{words} from {means[0]:.3g} to {means[-1]:.3g}{unit}. {remedy}"


def window(count: int) -> int:
    """Iterations that are averaged, of as many."""
    return max(1, count // 6)


def _moving(values: Sequence[float], width: int) -> list[float]:
    return [_mean(values[at : at + width]) for at in range(len(values) - width + 1)]


def _error(values: Sequence[float], width: int) -> float:
    """The standard error of the difference of two means over `width` values, by the changes between neighbors."""
    squares = _mean([(after - before) ** 2 for before, after in pairwise(values)])
    return math.sqrt(squares / width)  # a change has twice the variance of a value, and so has a difference of means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
