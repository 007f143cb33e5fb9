"""Pictures of a run: learning curves, and where in one response the credit went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in somebody's text is a dollar sign

GRAY, BLUE, ORANGE, RED, GREEN = "#888888", "#1f6fb4", "#e08a1e", "#c23b3b", "#2e8b57"

# A panel: title, unit of the vertical axis, and (metric, label, color) lines.
Panel = tuple[str, str, tuple[tuple[str, str, str], ...]]
LOSSES: Panel = (
    "Losses",
    "loss",
    (("policy_loss", "policy", BLUE), ("value_loss", "value", ORANGE), ("q_loss", "Q", RED)),
)
CRITIC: Panel = ("What the critic knows", "explained variance", (("explained_variance", "before its update", GREEN),))


@dataclass(frozen=True)
class Credit:
    """One response, token by token."""

    prompt: str
    tokens: Sequence[str]
    panels: Sequence[tuple[str, Sequence[float], str]]  # name, a number a token, color
    score: float


def draw_curves(path: Path, rows: Sequence[dict[str, Any]], title: str, panels: Sequence[Panel]) -> None:
    """Every metric of six panels over the iterations, where it was measured."""
    measured = {name for row in rows for name in row}
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (name, unit, lines) in zip(axes.flat, panels, strict=True):
        shown = [line for line in lines if line[0] in measured]
        for metric, label, color in shown:
            known = [row for row in rows if metric in row]
            axis.plot([row["iteration"] for row in known], [row[metric] for row in known], color=color, label=label)
        axis.set_title(name, fontsize=11)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        if not shown:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        if len(shown) > 1:
            axis.legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_credit(path: Path, credit: Credit) -> None:
    """What is known of every token of one response: penalty, value, TD error, advantage."""
    places = range(len(credit.tokens))
    figure, axes = pyplot.subplots(
        len(credit.panels),
        1,
        figsize=(min(max(7.0, 0.36 * len(credit.tokens)), 100.0), 2 * len(credit.panels)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, values, color) in zip(axes[:, 0], credit.panels, strict=True):
        axis.bar(places, values, color=color)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name, fontsize=9)
        axis.grid(axis="y", alpha=0.25)
    axes[-1, 0].set_xticks(list(places), list(credit.tokens), rotation=70, ha="right", fontsize=8)
    prompt = " ".join(credit.prompt.split())
    figure.suptitle(f"{prompt[-90:]}  →  score {credit.score:+.2f}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
