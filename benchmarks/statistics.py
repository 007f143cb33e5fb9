"""Interquartile means with bootstrap intervals over tasks and seeds.

The definitions are those of Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import trim_mean


def interquartile_mean(scores: Any) -> float:
    """The mean of the middle half of all runs; with fewer than four runs, the mean of all.

    scores: an array of any shape, or a sequence.
    """
    return float(trim_mean(np.asarray(scores, dtype=float).ravel(), 0.25))


def interval(
    groups: Sequence[Sequence[float]], seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """A percentile interval of the interquartile mean by a stratified bootstrap.

    groups: the runs of each task. Runs are resampled with replacement within each task, so every task keeps its weight.
    With two or three runs the interval is about the minimum to the maximum.
    """
    generator = np.random.default_rng(seed)
    resampled = [np.asarray(group, float)[generator.integers(0, len(group), (samples, len(group)))] for group in groups]
    means = trim_mean(np.concatenate(resampled, axis=1), 0.25, axis=1)  # [samples]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
