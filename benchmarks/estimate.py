"""What `train --estimate` says beside what a run takes, memory and checkpoint. `python -m benchmarks.estimate`

Each case is a run of two iterations in a process of its own, with four models: actor, critic, reference and reward
model. SmolLM2-135M is read from a folder, and its reward model is a copy of it with a head that is not trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import rows as result_rows
from benchmarks.support.measure import table
from benchmarks.support.models import EMBEDDED, SMOLLM2
from benchmarks.support.start import answer
from textenv.models.loading import quietly, without_report

KINDS = ("memory", "checkpoint")
# So short that a run takes a minute on a CPU: weights and the optimizer's state are nearly all.
SHORT: dict[str, Any] = {
    "settings": {"rollout_size": 8, "evaluation_prompts": 2},
    "train": {"minibatch_size": 8},
    "env_arg": ["device=cpu", "max_prompt_tokens=16", "max_new_tokens=32"],
}
MAIN: dict[str, Any] = {"settings": {"evaluation_prompts": 8}, "train": {}, "env_arg": ["device=cpu"]}
PROMPTS = [f"Describe the number {number} in a sentence:" for number in range(12)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs are measured."""

    smollm2: Path | None = None  # folder of SmolLM2-135M, for its cases
    lora_ranks: tuple[int, ...] = (0, 16)  # 0: full fine-tuning
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # the embedded model alone, at small sizes, to see that it runs


def cases(settings: Settings, work: Path) -> Iterator[dict[str, Any]]:
    """The jobs, see `measured_run`, with the names of their models."""
    embedded = SHORT if settings.quick else MAIN
    bases: list[tuple[str, dict[str, Any], list[str]]] = [(EMBEDDED, embedded, [])]
    if settings.smollm2 is not None and not settings.quick:
        reward = work / "reward"
        with quietly(), without_report():  # the head is new
            model = AutoModelForSequenceClassification.from_pretrained(settings.smollm2, num_labels=1)
            model.config.pad_token_id = model.config.eos_token_id
            model.save_pretrained(reward)
        AutoTokenizer.from_pretrained(settings.smollm2).save_pretrained(reward)
        parts = [f"reference={settings.smollm2.absolute()}", f"reward={reward}", f"prompts={json.dumps(PROMPTS)}"]
        bases.append((SMOLLM2, SHORT, parts))
    for name, sizes, parts in bases:
        for rank in settings.lora_ranks:
            adapters = {"lora_rank": rank} if rank else {}
            run = str(work / f"{name}-{rank}")
            job = {"run": run, "env_arg": [*sizes["env_arg"], *parts], "train": sizes["train"]}
            yield {"model": name, "lora_rank": rank, "job": job | {"settings": sizes["settings"] | adapters}}


def run(job: dict[str, Any], work: Path) -> dict[str, float]:
    """The numbers of one job, from a fresh process."""
    return answer("benchmarks.support.measured_run", job, work)


def measure(settings: Settings, work: Path) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    for case in cases(settings, work):
        numbers = run(case["job"], work)
        ratios = {
            f"{kind}, estimated / measured": numbers[f"estimated_{kind}_bytes"] / numbers[f"{kind}_bytes"]
            for kind in KINDS
        }
        sizes = {key: case["job"][key] for key in ("settings", "train")}
        yield {"model": case["model"], "lora_rank": case["lora_rank"], **sizes, **numbers, **ratios}


def lines_of(results: list[dict[str, Any]]) -> str:
    """The table of all cases, in GB."""
    header = ["model", "trained", *(f"{kind}, {what}" for kind in KINDS for what in ("estimated", "measured", "ratio"))]
    lines = []
    for row in results:
        cells = [row["model"], f"adapters of rank {row['lora_rank']}" if row["lora_rank"] else "all weights"]
        for kind in KINDS:
            cells += [f"{row[f'{way}{kind}_bytes'] / 1e9:.3f}" for way in ("estimated_", "")]
            cells.append(f"{row[f'{kind}, estimated / measured']:.2f}")
        lines.append(cells)
    return table(header, lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Estimated against measured, on logarithmic axes."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axis = figure.subplots()
    for kind, marker in zip(KINDS, "os", strict=True):
        points = [[row[f"{way}{kind}_bytes"] / 1e9 for row in results] for way in ("", "estimated_")]
        axis.loglog(*points, marker, label=kind)
    low, high = axis.get_xlim()
    axis.loglog([low, high], [low, high], color="gray", linewidth=0.8, label="equal")
    axis.set(xlabel="measured, GB", ylabel="estimated, GB")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    """Measure every case and print the table."""
    with tempfile.TemporaryDirectory() as work:
        result_rows.report("estimate", measure(settings, Path(work)), settings, lines_of, draw)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
