"""From scores as rewards give them to scores as the environment pays them: shifted, scaled and clipped.

It acts on what is paid at the end of a response; rewards of single tokens are paid as they are, since what was paid
cannot change when later scores move the statistics. The sum as the rewards gave it stays visible as the part "raw".
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from textenv.config import TextGenConfig
from textenv.rewards.base import Reward, Scores

RAW = "raw"  # the part that holds the response's score before normalization and clipping
SMALLEST = 1e-8  # a standard deviation below it is rounding, and would blow it up


class Statistics(Protocol):
    """The mean and the standard deviation that scores are measured by."""

    mean: float

    @property
    def std(self) -> float:
        """Above 0."""
        ...

    def update(self, values: Tensor) -> None:
        """Takes note of scores, [B]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


class FixedStatistics:
    """A mean and a standard deviation that are given, for instance the reference's own (Ziegler et al. 2019)."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = float(mean), float(std)

    def update(self, values: Tensor) -> None:
        """Nothing: they are fixed."""

    def state_dict(self) -> dict[str, Any]:
        """The two numbers."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.mean, self.std = float(state["mean"]), float(state["std"])


class RunningStatistics:
    """Mean and standard deviation of all scores so far, batch by batch (Welford 1962; Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: Σ (x − mean)²

    @property
    def std(self) -> float:
        """The population's standard deviation; 1 where the scores do not differ yet."""
        std = math.sqrt(self.squares / max(self.count, 1))
        return std if std > SMALLEST * max(1.0, abs(self.mean)) else 1.0

    def update(self, values: Tensor) -> None:
        """Takes note of scores, [B]."""
        values = values.double()
        if not len(values):
            return
        count, mean = len(values), float(values.mean())
        total, difference = self.count + count, mean - self.mean
        self.squares += float((values - mean).square().sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """The three sums."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])


class Normalizer:
    """`clip((score − mean) / std, −c, c)` of what is paid at the end; running statistics learn from the batch first."""

    def __init__(self, statistics: Statistics, clip: float | None = None) -> None:
        self.statistics, self.clip = statistics, clip

    def __call__(self, scores: Scores) -> Scores:
        """Scores as they are paid, with the part "raw"."""
        self.statistics.update(scores.final)
        final = standardize(scores.final, self.statistics.mean, self.statistics.std, self.clip)
        return replace(scores, final=final, parts=scores.parts | {RAW: scores.total})

    def with_frozen_statistics(self) -> Normalizer:
        """The same numbers from here on, whatever scores come."""
        return Normalizer(FixedStatistics(self.statistics.mean, self.statistics.std), self.clip)


def standardize(values: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """`(values − mean) / std`, within ± clip if there is one. Float32 [B]."""
    scaled = ((values.double() - mean) / std).float()
    return scaled if clip is None else scaled.clamp(-clip, clip)


def make_normalizer(config: TextGenConfig) -> Normalizer | None:
    """What the settings `score_...` ask for; None where scores are paid as they are."""
    if config.score_normalization == "running":
        return Normalizer(RunningStatistics(), config.score_clip)
    if config.score_normalization == "fixed" or config.score_clip is not None:
        return Normalizer(FixedStatistics(config.score_mean, config.score_std), config.score_clip)
    return None


def normalize(normalizer: Normalizer | None, scores: Scores) -> Scores:
    """Scores as they are paid; unchanged where there is no normalizer."""
    return scores if normalizer is None else normalizer(scores)


def paid_part_names(reward: Reward, normalizer: Normalizer | None) -> tuple[str, ...]:
    """The keys of `score_parts` under this reward and normalizer."""
    names = tuple(reward.part_names)
    if normalizer is None:
        return names
    if RAW in names:
        raise ValueError(
            f"a reward is named {RAW!r}, which is where the score before normalization is shown; give it another name."
        )
    return (*names, RAW)
