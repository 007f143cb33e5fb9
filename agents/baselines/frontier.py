"""The picture of what a score costs: score and gold score against the KL to the reference, of runs and baselines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from agents.reporting.plots import BLUE, GRAY, GREEN, ORANGE, RED
from agents.reporting.report import read_metrics

COLORS = (ORANGE, BLUE, RED, GREEN, "#7b5ea7", "#3aa6a6", GRAY)
PANELS = (("score", "Score: what is optimized"), ("gold", "Gold score: what is true"))


@dataclass(frozen=True)
class Curve:
    """One method: points with `kl`, `score`, perhaps `gold`, and perhaps a `label`, in order of the KL or of time."""

    name: str
    points: Sequence[dict[str, Any]]


def read_run(folder: Path) -> Curve:
    """The curve of a finished run, from its metrics, between what was measured on held-out prompts before and after.

    A run without a rollout, such as DPO's, is two points. Raises ValueError for a folder without these numbers.
    """
    summary = folder / "summary.json"
    if not os.path.isfile(summary):
        raise ValueError(f"--run names {str(folder)!r}, which has no summary.json; give the folder of a finished run.")
    found = json.loads(summary.read_text(encoding="utf-8"))
    if "kl_per_response" not in found or "score_after" not in found:
        raise ValueError(f"--run names {str(folder)!r}, whose summary has no score and no KL; give a run on text.")
    points = [_point(found, "before") | {"kl": 0.0}]
    points += [_of_iteration(row) for row in read_metrics(folder) if "kl_per_response" in row and "score" in row]
    points.append(_point(found, "after") | {"kl": found["kl_per_response"], "label": "end"})
    return Curve(folder.resolve().name, points)


def _point(summary: dict[str, Any], when: str) -> dict[str, Any]:
    names = [name for name, _ in PANELS if f"{name}_{when}" in summary]
    return {name: summary[f"{name}_{when}"] for name in names}


def _of_iteration(row: dict[str, Any]) -> dict[str, Any]:
    point = {"kl": row["kl_per_response"], "score": row.get("score/raw", row["score"])}
    return point | ({"gold": row["gold"]} if "gold" in row else {})


def draw_frontier(path: Path, curves: Sequence[Curve]) -> None:
    """Draw each method's score against its KL, and beside it the gold score where any has one."""
    panels = [panel for panel in PANELS if any(panel[0] in point for curve in curves for point in curve.points)]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.8), layout="constrained", squeeze=False
    )
    for axis, (metric, title) in zip(axes[0], panels, strict=True):
        for number, curve in enumerate(curves):
            points = [point for point in curve.points if metric in point]
            color, marker = COLORS[number % len(COLORS)], "os^Dv"[number % 5]  # readable without color too
            xs, ys = [point["kl"] for point in points], [point[metric] for point in points]
            style = ":" if len(points) == 2 else "-"  # between the ends of a training nothing was measured
            axis.plot(xs, ys, style, color=color, marker=marker, markersize=4, linewidth=1.2, label=curve.name)
            for point in points:
                place = (point["kl"], point[metric])
                axis.annotate(
                    point.get("label", ""), place, xytext=(4, -10), textcoords="offset points", fontsize=8, color=color
                )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("KL to the reference, nats a response (best of n: at most)")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.25)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
