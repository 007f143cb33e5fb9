"""How well a reward model's probabilities agree with held-out preferences.

Under Bradley-Terry the difference of two scores is the log-odds of the preference, and a score is the log-odds of label
1. So a model also says how sure it is: the confidence of its choice is σ(|log-odds|), from 1/2 to 1. A model is
calibrated if its choices of confidence c are right in a share c of the cases (Guo et al. 2017). Everything here is
symmetric: it does not matter which response comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from textenv.training.card import COLORS, mean_and_error

BINS = 10  # of equal width, on confidences from 1/2 to 1
RELIABILITY = "reliability.png"


@dataclass(frozen=True)
class Bin:
    """The rows whose confidence is in [low, high), the last bin's in [low, 1]."""

    low: float
    high: float
    rows: int
    confidence: float | None  # mean over the rows; None without any
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Held-out numbers of one reward model or ensemble. Standard errors are None for fewer than two prompts."""

    rows: int
    accuracy: float  # share of right choices; log-odds of exactly 0 count half
    accuracy_error: float | None
    log_loss: float  # mean of −log p(what was chosen, or the label), nats; log 2 = 0.693 for a model that knows nothing
    log_loss_error: float | None
    calibration_error: float  # Σ over bins of (rows / all rows) · |accuracy − confidence| (Guo et al. 2017, equation 3)
    expected_error: float  # about what a calibrated model would have for that number, since bins have few rows
    bins: tuple[Bin, ...]


def calibrate(logits: Tensor, targets: Tensor, clusters: Sequence[Any] = ()) -> Calibration:
    """Compare log-odds with what they predict.

    logits: [N], log-odds of target 1; targets: 0 or 1, [N]; clusters: the prompt of each row, see `mean_and_error`.
    """
    logits, targets = logits.double(), targets.double()
    right = right_choices(logits, targets)  # [N]
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # [N]
    bins = tuple(_bins(logits.abs().sigmoid(), right))
    filled = [(each.rows / len(logits), each.rows, each.confidence, each.accuracy) for each in bins if each.rows]
    return Calibration(
        len(logits),
        *mean_and_error(right.tolist(), clusters),
        *mean_and_error(losses.tolist(), clusters),
        sum(share * abs(accuracy - confidence) for share, _, confidence, accuracy in filled),  # type: ignore[operator]
        # The mean of |x| is std · √(2/π) for a normal x of mean 0.
        sum(share * math.sqrt(2 / math.pi * c * (1 - c) / rows) for share, rows, c, _ in filled),  # type: ignore[operator]
        bins,
    )


def right_choices(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether log-odds choose the target: 1 or 0, and a half where they are exactly 0. [N] each."""
    return torch.where(logits == 0, 0.5, ((logits > 0) == (targets > 0.5)).to(logits.dtype))


def _bins(confidence: Tensor, right: Tensor) -> list[Bin]:
    """confidence, right: float64 [N]."""
    edges = [0.5 + 0.5 * index / BINS for index in range(BINS + 1)]
    number = ((confidence - 0.5) * (2 * BINS)).long().clamp(0, BINS - 1)  # [N]
    bins = []
    for index in range(BINS):
        inside = number == index
        means = [float(values[inside].mean()) if inside.any() else None for values in (confidence, right)]
        bins.append(Bin(edges[index], edges[index + 1], int(inside.sum()), *means))
    return bins


def draw_reliability(path: Path, calibration: Calibration) -> None:
    """Draw accuracy against confidence by bins, with standard errors, and how many rows each bin has."""
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [each for each in calibration.bins if each.rows]
    confidence = [each.confidence or 0.0 for each in filled]
    accuracy = [each.accuracy or 0.0 for each in filled]
    # Of a calibrated model: an accuracy of 0 or 1 in a bin of few rows would look certain.
    errors = [math.sqrt(c * (1 - c) / each.rows) for c, each in zip(confidence, filled, strict=True)]
    upper.plot([0.5, 1], [0.5, 1], color="#888888", linewidth=1, label="calibrated")
    upper.errorbar(confidence, accuracy, errors, fmt="o", color=COLORS[0], capsize=2, label="held-out rows")
    upper.set_ylabel("share of right choices")
    upper.legend(frameon=False, loc="upper left")
    lower.bar(
        [each.low for each in calibration.bins], [each.rows for each in calibration.bins], 0.5 / BINS, align="edge"
    )
    lower.set_ylabel("rows")
    lower.set_xlabel("confidence of the choice, σ(|log-odds|)")
    lower.set_xlim(0.5, 1)
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
    figure.suptitle(f"calibration error {calibration.calibration_error:.3f}", fontsize=11)
    figure.savefig(path, dpi=110)
