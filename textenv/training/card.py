"""The card beside trained weights: README.md and training.json, with the numbers, the curve, and how to use them."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

CURVE = "curve.png"
RECORD = "training.json"
LIBRARIES = ("textenv", "torch", "transformers", "accelerate")
COLORS = ("#1f6fb4", "#e08a1e", "#2e8b57", "#c23b3b")


@dataclass(frozen=True)
class Number:
    """A measured number with its standard error, None where there is none, and what it means."""

    name: str
    value: float
    error: float | None
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says."""

    title: str
    about: str  # a paragraph: what the model is
    base: str  # folder or hub name
    data: Mapping[str, Any]  # what is known of the data: file, rows, hash
    settings: Mapping[str, Any]
    numbers: Sequence[Number]
    sections: Sequence[tuple[str, str]] = ()  # further headings with Markdown: samples, pictures
    use: str  # the command that uses the model
    record: Mapping[str, Any]  # JSON: the whole of training.json besides the above, such as the history


def write_card(folder: Path, card: Card) -> None:
    """Write README.md and training.json into the folder of the weights."""
    made = {"versions": {name: _version(name) for name in LIBRARIES}, "machine": machine()}
    numbers = {number.name: {"value": number.value, "standard_error": number.error} for number in card.numbers}
    record = {
        "base": card.base,
        "data": card.data,
        "settings": card.settings,
        "numbers": numbers,
        **card.record,
        **made,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    parts = [
        _front_matter(card.base),
        f"# {card.title}",
        card.about,
        table(("", ""), [("base", code(card.base)), *((name, code(value)) for name, value in card.data.items())]),
        "## Numbers",
        table(("", "", "± standard error"), [_row(number) for number in card.numbers]),
        *(text for heading, body in card.sections for text in (f"## {heading}", body)),
        "## Use",
        f"```bash\n{card.use}\n```",
        "## Settings",
        table(("setting", "value"), [(code(name), code(value)) for name, value in card.settings.items()]),
        f"{made['machine']}; " + ", ".join(f"{name} {number}" for name, number in made["versions"].items()) + ".",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(base: str) -> str:
    """What the Hugging Face Hub reads. A base that is a folder is nobody else's, so it is left out."""
    named = [] if os.path.isdir(base) else [f"base_model: {base}"]
    return "\n".join(["---", "library_name: transformers", *named, "tags: [textenv]", "---"])


def _row(number: Number) -> tuple[str, str, str]:
    error = "" if number.error is None else f"± {number.error:.3g}"
    return number.meaning, f"{number.value:.4g}", error


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(value: Any) -> str:
    """Any value as a Markdown code span in a table: no mark in it has a meaning, and it stays on its line."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if "`" in text else ""
    return f"{marks}{edge}{text}{edge}{marks}" if text else ""


def fenced(text: str) -> str:
    """A text as a Markdown block in which no mark has a meaning."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}text\n{text}\n{marks}"


def machine() -> str:
    """What the training ran on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {device}"


def mean_and_error(
    values: Sequence[float], clusters: Sequence[Any] = (), weights: Sequence[float] = ()
) -> tuple[float, float | None]:
    """The mean of values and its standard error, None for fewer than two independent values.

    clusters: for each value the name of its cluster, such as its prompt, whose values are not independent; by default
    every value is independent. weights: what each value is a sum over, such as a number of tokens, so that the mean is
    the ratio of the sums; by default 1. Linearized, with G/(G - 1) for G clusters.
    """
    weights = weights or [1.0] * len(values)
    mean = sum(values) / sum(weights)
    residuals: dict[Any, float] = {}
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        key = clusters[index] if clusters else index
        residuals[key] = residuals.get(key, 0.0) + value - mean * weight
    if len(residuals) < 2:
        return mean, None
    variance = sum(residual**2 for residual in residuals.values()) * len(residuals) / (len(residuals) - 1)
    return mean, variance**0.5 / sum(weights)


def _version(name: str) -> str | None:
    """The version of a distribution; None of one that is used without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def draw_curve(path: Path, history: Sequence[Mapping[str, Any]], lines: Mapping[str, str], unit: str) -> None:
    """Draw numbers of a training's history over its steps.

    lines: the label of each number to draw, by its name in the history. unit: of the vertical axis.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, label), color in zip(lines.items(), cycle(COLORS), strict=False):
        rows = [row for row in history if name in row]
        marker = "o" if len(rows) < 30 else None
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=marker, color=color, label=label)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
