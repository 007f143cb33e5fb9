"""Figures of a run: learning curves, and the credit assigned to each token of a response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

matplotlib.rcParams["text.parse_math"] = False  # dollar signs in prompts and responses are text, not math

GRAY, BLUE, ORANGE, RED, GREEN = "#888888", "#1f6fb4", "#e08a1e", "#c23b3b", "#2e8b57"


@dataclass(frozen=True)
class Line:
    """A metric in a panel."""

    metric: str
    label: str
    color: str
    evaluated: str = ""  # its name in the summary of an evaluation, whose values before and after training are drawn


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Metrics that share an axis.

    An axis that is fitted to its numbers makes noise look like a trend. So it always shows the values in `shows`: zero,
    where zero means something, and a change that matters. It also shows one standard deviation to both sides of the
    values before training, if `deviation` names it in the evaluation's summary.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    shows: tuple[float, ...] = ()
    deviation: str = ""


# The mean of whitened advantages is 0, and so is the loss before the first step of an update. Hundredths are small.
POLICY_LOSS = Panel(title="Policy loss", unit="loss", lines=(Line("policy_loss", "policy", BLUE),), shows=(-0.02, 0.02))
VALUE_LOSS = Panel(
    title="Value loss",
    unit="loss",
    lines=(Line("value_loss", "value", ORANGE), Line("q_loss", "Q", RED)),
    shows=(0.0,),
)
CRITIC = Panel(
    title="Critic",
    unit="explained variance",
    lines=(Line("explained_variance", "before its update", GREEN),),
    shows=(0.0, 1.0),
)
UPDATE = Panel(
    title="KL of the old and the new policy",
    unit="nats a step",
    lines=(Line("approx_kl", "KL", RED),),
    shows=(0.0, 0.01),
)


# Bars over the tokens of a response: name of the axis, and the numbers in it with their labels and colors.
CREDIT: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("log-probability", (("log_prob", "log π", BLUE), ("reference_log_prob", "log π_ref", GRAY))),
    ("reward r̃_t", (("score", "score", GREEN), ("penalty", "−β·KL", RED))),
    ("V(s_t), before the token", (("value", "", BLUE),)),
    ("TD error δ_t", (("td_error", "", ORANGE),)),
    ("A_t before whitening", (("advantage", "", GREEN),)),
)


def draw_curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    panels: Sequence[Panel],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Draw the metrics of a run over its iterations; a panel of which nothing was measured is left out.

    rows: metrics of iterations, with `iteration`. before, after: summaries of the evaluations, drawn as dashed lines
    and as circles behind the last iteration.
    """
    panels = [panel for panel in panels if _measured(panel, rows, before)]
    last = max((row["iteration"] for row in rows), default=1)
    columns = math.ceil(len(panels) / 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(4.2 * columns, 7), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        drawn = _measured(panel, rows, before)
        for line in drawn:
            _draw_metric(axis, line, rows)
            _draw_evaluations(axis, line, before, after, last)
        _show(axis, panel, before)
        axis.set(title=panel.title, ylabel=panel.unit, xlabel="iteration", xlim=(0, 1.02 * last))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        if len(drawn) > 1:
            handles = [Line2D([], [], color=line.color, label=line.label) for line in drawn]
            axis.legend(handles=handles, frameon=False, fontsize=9)
    _explain_evaluations(figure)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def with_gaps(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """All iterations from the first of `rows` to the last, and a metric at each: NaN where it was not measured."""
    values = {row["iteration"]: row.get(metric, math.nan) for row in rows}
    iterations = list(range(min(values), max(values) + 1)) if values else []
    return iterations, [values.get(iteration, math.nan) for iteration in iterations]


def _measured(panel: Panel, rows: Sequence[Mapping[str, Any]], before: Mapping[str, float]) -> list[Line]:
    """The lines of which there are numbers, of iterations or of evaluations."""
    recorded = {name for row in rows for name in row}
    return [line for line in panel.lines if line.metric in recorded or line.evaluated in before]


def _draw_metric(axis: Axes, line: Line, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line with gaps, not bridged, where nothing was measured. A value between two gaps is a dot."""
    iterations, values = with_gaps(rows, line.metric)
    axis.plot(iterations, values, color=line.color)
    around = [math.nan, *values, math.nan]
    alone = [math.isnan(left) and math.isnan(right) for left, right in zip(around, around[2:], strict=False)]
    dots = [value if single else math.nan for value, single in zip(values, alone, strict=False)]
    axis.plot(iterations, dots, ".", color=line.color, markersize=4)


def _draw_evaluations(
    axis: Axes, line: Line, before: Mapping[str, float], after: Mapping[str, float], last: int
) -> None:
    if line.evaluated in before:
        axis.axhline(before[line.evaluated], color=line.color, linestyle="--", linewidth=1)
    if line.evaluated in after:
        axis.plot(last, after[line.evaluated], "o", color=line.color, markersize=7, fillstyle="none", clip_on=False)


def _show(axis: Axes, panel: Panel, before: Mapping[str, float]) -> None:
    """Widen the vertical axis to what it always shows."""
    deviation, shown = before.get(panel.deviation, 0.0), list(panel.shows)
    for line in panel.lines:
        if line.evaluated in before:
            shown += [before[line.evaluated] - deviation, before[line.evaluated] + deviation]
    low, high = axis.get_ylim()
    axis.set_ylim(min([low, *shown]), max([high, *shown]))


def _explain_evaluations(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=GRAY, linestyle="--", linewidth=1, label="evaluation before training"),
        Line2D([], [], color=GRAY, linestyle="", marker="o", fillstyle="none", label="evaluation after training"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def draw_credit(path: Path, record: Mapping[str, Any]) -> None:
    """Draw what the learner made of one response: bars over its generated tokens, of whatever numbers there are.

    record: as JSON, see `agents.text.records.Record`.
    """
    numbers = {name: [number or 0.0 for number in values] for name, values in record["numbers"].items()}
    if not any(numbers.get("penalty", ())):
        numbers.pop("penalty", None)  # β is 0
    panels = [(name, [bars for bars in group if bars[0] in numbers]) for name, group in CREDIT]
    panels = [(name, group) for name, group in panels if group]
    written = [token for token, own in zip(record["tokens"], record["generated"], strict=True) if own]
    size = min(max(7.0, 0.36 * len(written)), 100.0), 2.0 * len(panels)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (name, group) in zip(axes[:, 0], panels, strict=True):
        for at, (number, label, color) in enumerate(group):
            sign = -1.0 if number == "penalty" else 1.0
            positions = [place + (at - (len(group) - 1) / 2) * 0.8 / len(group) for place in range(len(written))]
            axis.bar(positions, [sign * value for value in numbers[number]], 0.8 / len(group), color=color, label=label)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name, fontsize=9)
        axis.grid(axis="y", alpha=0.25)
        if len(group) > 1:
            axis.legend(frameon=False, fontsize=8)
    axes[-1, 0].set_xticks(
        range(len(written)), [repr(token)[1:-1] for token in written], rotation=70, ha="right", fontsize=8
    )
    prompt = " ".join(record["prompt"].split())
    figure.suptitle(f"{prompt[-90:]}  →  score {record['score']:+.2f}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
