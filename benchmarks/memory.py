"""Peak memory of a PPO update, here and with whole logits, each in a fresh process. `python -m benchmarks.memory`

Cases: a tiny model with a vocabulary of 151,936 and responses of 512 tokens, where logits are everything; and
SmolLM2-135M, where weights and optimizer are. Micro-batches hold as many rows on both sides. The peak is the resident
memory of the whole process during the update, weights and libraries included; *more* is what the update adds to what
was there before it. support/update.py has the other side's code.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from matplotlib.figure import Figure

from benchmarks import rows as result_rows
from benchmarks.support import models
from benchmarks.support.measure import table
from benchmarks.support.start import answer

WIDE = "tiny trunk, vocabulary 151,936"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Cases, sizes and repeats."""

    smollm2: Path | None = None  # folder of SmolLM2-135M, for its case
    models: tuple[str, ...] = (WIDE, models.SMOLLM2)  # SmolLM2-135M, and names of support/models.py
    rows: tuple[int, ...] = (4, 8)  # responses of the update, by model
    micro_rows: tuple[int, ...] = (4, 8)  # responses of a micro-batch, by model
    prompt: tuple[int, ...] = (8, 8)  # tokens, by model
    response: tuple[int, ...] = (512, 128)  # tokens, by model
    repeats: int = 2  # fresh processes of each side
    # settings of training on this side, NAME=VALUE, added as a second way beside the defaults
    flags: tuple[str, ...] = ()
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {
    "models": ("GPT-2, 0.2M",),
    "rows": (2,),
    "micro_rows": (2,),
    "prompt": (8,),
    "response": (16,),
    "repeats": 1,
}


def measure(index: int, settings: Settings, work: Path) -> dict[str, Any]:
    """One row of the table: all sides of a case, in turns."""
    job = {
        "model": settings.models[index],
        "smollm2": settings.smollm2 and str(settings.smollm2),
        **{key: getattr(settings, key)[index] for key in ("rows", "micro_rows", "prompt", "response")},
    }
    sides: dict[str, tuple[str, tuple[str, ...]]] = {"whole logits": ("plain", ()), "ours": ("ours", ())}
    if settings.flags:
        sides["ours, with flags"] = ("ours", settings.flags)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(settings.repeats):
        for name, (side, flags) in sides.items():
            measured[name].append(answer("benchmarks.support.update", job | {"side": side, "flags": flags}, work))
    row: dict[str, Any] = {**job, "all": measured}
    for name, turns in measured.items():
        peak, before = (median(turn[key] for turn in turns) for key in ("peak_bytes", "before_bytes"))
        row[name] = {"peak_bytes": peak, "before_bytes": before, "more_bytes": peak - before}
    for name in list(sides)[1:]:
        for key in ("peak_bytes", "more_bytes"):
            row[f"{name} / whole logits, {key}"] = row[name][key] / max(row["whole logits"][key], 1)
    return row


def lines_of(results: list[dict[str, Any]]) -> str:
    """The table of all cases."""
    header = ["model", "micro-batch", "side", "peak, GB", "more, GB", "peak / whole logits", "more / whole logits"]
    lines = []
    for row in results:
        for name in ("whole logits", "ours", "ours, with flags"):
            if name in row:
                keys = [f"{name} / whole logits, {key}" for key in ("peak_bytes", "more_bytes")]
                size = f"{row['micro_rows']} x ({row['prompt']} + {row['response']})"
                numbers = [f"{row[name][key] / 1e9:.2f}" for key in ("peak_bytes", "more_bytes")]
                lines.append(
                    [row["model"], size, name, *numbers, *(f"{row[key]:.2f}" if key in row else "" for key in keys)]
                )
    return table(header, lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars: memory before the update, and what it adds."""
    figure = Figure(figsize=(5 * len(results), 3), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        names = [name for name in ("ours, with flags", "ours", "whole logits") if name in row]
        before, more = ([row[name][key] / 1e9 for name in names] for key in ("before_bytes", "more_bytes"))
        axes.barh(names, before, color="lightgray", label="before the update")
        bars = axes.barh(names, more, left=before, color="tab:blue", label="more during it")
        axes.bar_label(bars, [f" {row[name]['peak_bytes'] / 1e9:.2f}" for name in names], fontsize=8)
        axes.margins(x=0.15)
        axes.set_title(f"{row['model']}\n{row['micro_rows']} x ({row['prompt']} + {row['response']})", fontsize=9)
        axes.set_xlabel("resident memory at the peak, GB")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    """Measure every case and print the table."""
    settings = replace(settings, **QUICK) if settings.quick else settings
    names = [name for name in settings.models if name != models.SMOLLM2 or settings.smollm2]
    if not names:
        raise SystemExit("SmolLM2-135M is measured from a folder; pass it as --smollm2.")
    with tempfile.TemporaryDirectory() as work:
        measured = (measure(settings.models.index(name), settings, Path(work)) for name in names)
        result_rows.report("memory", measured, settings, lines_of, draw)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
