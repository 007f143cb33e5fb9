"""Figures of a run: learning curves, and the credit assigned to each token of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

matplotlib.rcParams["text.parse_math"] = False  # dollar signs in prompts and responses are text, not math

GRAY, BLUE, ORANGE, RED, GREEN = "#888888", "#1f6fb4", "#e08a1e", "#c23b3b", "#2e8b57"

# A panel: title, unit of the vertical axis, and (metric, label, color) lines.
Panel = tuple[str, str, tuple[tuple[str, str, str], ...]]
LOSSES: Panel = (
    "Losses",
    "loss",
    (("policy_loss", "policy", BLUE), ("value_loss", "value", ORANGE), ("q_loss", "Q", RED)),
)
CRITIC: Panel = ("Critic", "explained variance", (("explained_variance", "before its update", GREEN),))


@dataclass(frozen=True)
class Credit:
    """One response with named numbers for each token."""

    prompt: str
    tokens: Sequence[str]
    panels: Sequence[tuple[str, Sequence[float], str]]  # (name, one number per token, color)
    score: float


def draw_curves(path: Path, rows: Sequence[dict[str, Any]], title: str, panels: Sequence[Panel]) -> None:
    """Draw the metrics of six panels over iterations; iterations without a metric are skipped."""
    recorded = {name for row in rows for name in row}
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (name, unit, lines) in zip(axes.flat, panels, strict=True):
        present = [line for line in lines if line[0] in recorded]
        for metric, label, color in present:
            points = [row for row in rows if metric in row]
            axis.plot([row["iteration"] for row in points], [row[metric] for row in points], color=color, label=label)
        axis.set_title(name, fontsize=11)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        if not present:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        if len(present) > 1:
            axis.legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_credit(path: Path, credit: Credit) -> None:
    """Draw one bar chart per panel over the tokens of a response."""
    positions = range(len(credit.tokens))
    figure, axes = pyplot.subplots(
        len(credit.panels),
        1,
        figsize=(min(max(7.0, 0.36 * len(credit.tokens)), 100.0), 2 * len(credit.panels)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, values, color) in zip(axes[:, 0], credit.panels, strict=True):
        axis.bar(positions, values, color=color)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name, fontsize=9)
        axis.grid(axis="y", alpha=0.25)
    axes[-1, 0].set_xticks(list(positions), list(credit.tokens), rotation=70, ha="right", fontsize=8)
    prompt = " ".join(credit.prompt.split())
    figure.suptitle(f"{prompt[-90:]}  →  score {credit.score:+.2f}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
