"""Score normalization: the environment pays `clip((score − mean) / std, −c, c)`.

- `score_normalization="none"` pays scores unchanged, within ± `score_clip` if it is set.
- `"fixed"` uses `score_mean` and `score_std`, for instance those of the reference's own responses (Ziegler et al.
  2019).
- `"running"` uses the mean and standard deviation of all scores so far, including the current batch.

It applies to the score that is paid at the end of a response. Per-token rewards are paid unchanged, since they have
been paid before later scores move the statistics. `info["score"]` is the normalized score; the score before
normalization is `info["score_parts"]["raw"]`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from textenv.config import TextGenConfig
from textenv.rewards.base import Reward, Scores

RAW = "raw"  # name of the part that holds the score before normalization and clipping
MIN_STD = 1e-8  # a smaller standard deviation, relative to the mean, is rounding error


class Statistics(Protocol):
    """The mean and standard deviation used to normalize scores."""

    mean: float

    @property
    def std(self) -> float:
        """The standard deviation, above 0."""
        ...

    def update(self, values: Tensor) -> None:
        """Update the statistics with new scores, [B]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        ...


class FixedStatistics:
    """A constant mean and standard deviation."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = float(mean), float(std)

    def update(self, values: Tensor) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The mean and the standard deviation."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.mean, self.std = float(state["mean"]), float(state["std"])


class RunningStatistics:
    """Mean and standard deviation of all scores so far, updated by batches (Welford 1962; Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: Σ (x − mean)²

    @property
    def std(self) -> float:
        """The population standard deviation; 1 while all scores are equal."""
        std = math.sqrt(self.squares / max(self.count, 1))
        return std if std > MIN_STD * max(1.0, abs(self.mean)) else 1.0

    def update(self, values: Tensor) -> None:
        """Update the statistics with new scores, [B]."""
        values = values.double()
        if not len(values):
            return
        center = values.mean()
        mean, squares = torch.stack([center, (values - center).square().sum()]).tolist()  # one transfer from a GPU
        count = len(values)
        total, difference = self.count + count, mean - self.mean
        self.squares += squares + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Count, mean, and sum of squared deviations."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])


class Normalizer:
    """Pays `clip((score − mean) / std, −c, c)` at the end. Running statistics are updated with the batch first."""

    def __init__(self, statistics: Statistics, clip: float | None = None) -> None:
        self.statistics, self.clip = statistics, clip

    def __call__(self, scores: Scores) -> Scores:
        """Normalize the final scores, and add the part "raw"."""
        self.statistics.update(scores.final)
        return replace(scores, final=self.normalized(scores.final), parts=scores.parts | {RAW: scores.total})

    def normalized(self, final: Tensor) -> Tensor:
        """Final scores [B] normalized by the present statistics, which do not change. Float32 [B]."""
        return standardize(final, self.statistics.mean, self.statistics.std, self.clip)

    def with_frozen_statistics(self) -> Normalizer:
        """A normalizer with the current mean and standard deviation as constants."""
        return Normalizer(FixedStatistics(self.statistics.mean, self.statistics.std), self.clip)


def standardize(values: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """`(values − mean) / std`, clipped to ± clip unless that is None. values: [B]. Returns float32 [B]."""
    scaled = ((values.double() - mean) / std).float()
    return scaled if clip is None else scaled.clamp(-clip, clip)


def make_normalizer(config: TextGenConfig) -> Normalizer | None:
    """The normalizer for the `score_...` settings; None if scores are paid unchanged."""
    if config.score_normalization == "running":
        return Normalizer(RunningStatistics(), config.score_clip)
    if config.score_normalization == "fixed" or config.score_clip is not None:
        return Normalizer(FixedStatistics(config.score_mean, config.score_std), config.score_clip)
    return None


def paid_part_names(reward: Reward, normalizer: Normalizer | None) -> tuple[str, ...]:
    """The keys of `score_parts` under this reward and normalizer. Raises ValueError if a reward is named "raw"."""
    names = tuple(reward.part_names)
    if normalizer is None:
        return names
    if RAW in names:
        raise ValueError(
            f"a reward is named {RAW!r}, which is the key of the score before normalization; give it another name."
        )
    return (*names, RAW)
