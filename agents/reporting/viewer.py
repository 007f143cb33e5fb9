"""The page of a run: report.html, one file that needs no network, with every number that it shows inside.

Texts of a run come from a model, and may be anything. Numbers and texts lie in the page as JSON in which no character
ends the element, and enter it as text nodes. A content security policy lets the page's own script and style through,
by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from agents.reporting.alarms import FEWEST, find_alarms
from agents.reporting.files import is_number
from agents.reporting.plots import BLUE, GRAY, GREEN, ORANGE, RED, Panel
from agents.reporting.record_file import read_records
from agents.reporting.report import finished_summary, read_metrics
from textenv.training.files import replacing, write_json

FILE = "report.html"
OUTLINE = "page.json"  # what a page needs besides the numbers
SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "charts.js", "tokens.js", "page.js")
COLORS = {BLUE: "blue", GRAY: "gray", GREEN: "green", ORANGE: "orange", RED: "red"}
REFRESH = 15  # seconds between two looks at a run that goes on
# Characters that could end a script element, or start a comment in it.
ESCAPED = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
RECORD_FIELDS = (
    *("iteration", "source", "row", "ids", "generated", "numbers", "score", "raw_score", "gold", "kl", "finish"),
)
# Numbers of the summary, with the names of those before and after training.
TILES = (
    ("score", "score_before", "score_after"),
    ("gold", "gold_before", "gold_after"),
    ("return", "return_before", "return_after"),
    ("KL, nats a response", "", "kl_per_response"),  # before training there is none
    ("length, tokens", "length_before", "length_after"),
    ("distinct word pairs", "distinct_bigrams_before", "distinct_bigrams_after"),
)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a page needs besides the numbers of a training."""

    title: str
    seed: int
    iterations: int  # that the training is to have
    panels: Sequence[dict[str, Any]]  # of the learning curves, see `describe_panel`
    before: Mapping[str, float]  # summary of the evaluation before training
    unit: str = "iteration"  # what an iteration is called


@dataclass(frozen=True, kw_only=True)
class RunReport(Outline):
    """What the page of a run shows."""

    folder: str
    metrics: Sequence[Mapping[str, Any]]  # by iteration, see `report.Scalars`
    records: Sequence[Mapping[str, Any]]  # see `record_file`
    summary: Mapping[str, Any] | None  # of a finished run
    running: bool  # goes on, so that the page refreshes


def write_outline(folder: Path, outline: Outline) -> None:
    """Write what a page of the run needs besides its numbers."""
    write_json(folder / OUTLINE, vars(outline))


def read_report(folder: Path, running: bool) -> RunReport:
    """What a run has written until now. Raises ValueError for a folder without a run."""
    if not os.path.isfile(folder / OUTLINE):  # Path.is_file raises OSError for a name that is too long
        raise ValueError(f"no run in {str(folder)!r} (no {OUTLINE}); pass a run folder written by train.")
    try:
        outline = {"unit": Outline.unit} | json.loads((folder / OUTLINE).read_bytes())
        fields = {field.name: outline[field.name] for field in dataclasses.fields(Outline)}
        _check_outline(fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(folder / OUTLINE)!r} is damaged ({error}); --resume writes it again.") from error
    summary = finished_summary(folder, fields["iterations"])
    metrics, records = read_metrics(folder, fields["iterations"]), read_records(folder)
    return RunReport(
        **fields,
        folder=str(folder),
        metrics=metrics,
        records=records,
        summary=summary,
        running=running and summary is None,
    )


def _check_outline(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of another kind than a page needs."""
    kinds = {"title": str, "unit": str, "seed": int, "iterations": int, "panels": list, "before": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(fields[name], kind)]
    if not wrong and not all(map(_is_panel, fields["panels"])):
        wrong = ["panels"]
    if wrong:
        raise ValueError(f"wrong {', '.join(wrong)}")


def _is_panel(panel: Any) -> bool:
    """Whether it is what `describe_panel` returns."""
    if not (isinstance(panel, dict) and isinstance(panel.get("lines"), list) and "title" in panel and "unit" in panel):
        return False
    return all(isinstance(line, dict) and line.keys() >= {"metric", "label", "color"} for line in panel["lines"])


def write_page(folder: Path, report: RunReport) -> Path:
    """Write the page of a run into its folder. Returns its path."""
    with replacing(folder / FILE) as file:
        file.write(render_page(report))
    return folder / FILE


def render_page(report: RunReport) -> bytes:
    """The page of a run, UTF-8."""
    style, script = _source("report.css"), "\n".join(map(_source, SCRIPTS))
    allowed = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    text = _template().render(
        policy=f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(as_script_data(page_data(report))),
        title=report.title,
        unit=report.unit.capitalize(),
        seed=report.seed,
        folder=report.folder,
        status=status(report),
        refresh=report.running,
        tiles=_tiles(report.summary or {}),
        alarms=find_alarms(report.metrics),
        calm=_calm(report),
    )
    return text.encode("utf-8", "backslashreplace")  # names of folders may hold surrogates


def page_data(report: RunReport) -> dict[str, Any]:
    """What the page's script reads: panels, metrics, and records, whose tokens are in a vocabulary of their own."""
    vocabulary: dict[int, tuple[str, int]] = {}
    for record in report.records:
        vocabulary.update(zip(record["ids"], zip(record["tokens"], record["special"], strict=True), strict=True))
    return {
        "iterations": report.iterations,
        "unit": report.unit,
        "refresh": REFRESH if report.running else 0,
        "panels": report.panels,
        "before": report.before,
        # Steps without a measurement are left out, so that the others are joined by a line.
        "metrics": _all_iterations(report.metrics) if report.unit == Outline.unit else report.metrics,
        "vocabulary": vocabulary,
        "records": [{name: record[name] for name in RECORD_FIELDS} for record in report.records],
    }


def describe_panel(panel: Panel) -> dict[str, Any]:
    """A panel of the learning curves as JSON."""
    lines = [vars(line) | {"color": COLORS[line.color]} for line in panel.lines]
    return {"title": panel.title, "unit": panel.unit, "shows": panel.shows, "lines": lines}


def as_script_data(value: Any) -> str:
    r"""JSON that is safe inside a script element: ASCII, with <, > and & as \u003c and so on."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).translate(ESCAPED)


def status(report: RunReport) -> str:
    """How far the run is, in words."""
    done = report.metrics[-1]["iteration"] if report.metrics else 0
    if report.summary is not None:
        return f"finished, {report.iterations} {report.unit}s"
    if report.running:
        return f"running, {done} of {report.iterations} iterations"
    return f"stopped after {done} of {report.iterations} iterations; train --resume goes on from its last checkpoint"


def _all_iterations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every iteration, so that lost ones leave a gap."""
    known = {row["iteration"]: row for row in rows}
    return [{"iteration": number} | dict(known.get(number, {})) for number in range(1, max(known, default=0) + 1)]


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """Name, number before, and number after, of what the summary has; it may be damaged."""
    numbers = {name: _short(value) for name, value in summary.items() if is_number(value)}
    return [(name, numbers.get(before), numbers[after]) for name, before, after in TILES if after in numbers]


def _short(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _calm(report: RunReport) -> str:
    if report.unit != Outline.unit:
        return "Alarms are for rollouts, and this training has none: compare the numbers above, and read the responses."
    if len(report.metrics) < FEWEST or not any("score" in row for row in report.metrics):
        return "Alarms are for runs on text, from iteration 6 on."
    if any("gold" in row for row in report.metrics):
        return "No alarm: gold does not fall while the score rises; length, diversity and entropy have not collapsed."
    return (
        "No alarm: length, diversity and entropy have not collapsed. There is no gold rater to compare the score with."
    )


@cache
def _template() -> Any:
    return Environment(autoescape=True).from_string(_source("report.html"))


@cache
def _source(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
