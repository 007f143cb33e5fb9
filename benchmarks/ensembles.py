"""Over-optimization with an ensemble of reward models on TextGen-v0: score, gold score and KL without a penalty.

`python -m benchmarks.ensembles`. Four reward models are trained on the same noisy choices of the gold rater between
samples of the supervised model, fewer than the shipped reward model's, with seeds of their own. PPO then optimizes the
members' mean score less κ times their standard deviation, one member alone, and the shipped reward model, with β = 0
and a constant learning rate (Coste et al. 2024). Each run has one thread; `workers` runs are in parallel. `--quick`
shows that it runs, at small sizes, and writes to a temporary folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
import tyro
from matplotlib import pyplot
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import rows
from benchmarks.algorithms import COLORS
from benchmarks.statistics import interquartile_mean, interval
from benchmarks.text_jobs import by_name, run
from textenv.reviews.measure import Comparison, as_pairs, compare
from textenv.reviews.prompts import held_out_prompts, train_prompts
from textenv.reviews.sampling import sample_responses
from textenv.reviews.weights import SUPERVISED
from textenv.rewards.reward_model import member_name
from textenv.training.reward_card import report_of
from textenv.training.reward_model import RewardConfig, fit, head_scores, load_base, save

NOISE = 0.5  # of the gold rater's choices, as in textenv.reviews.build
RECORD = "choices.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of the reward models and of the runs."""

    members: int = 4  # reward models
    pairs: int = 8192  # training pairs, a quarter of the shipped reward model's
    held_out: int = 2048  # pairs on prompts that no reward model and no run trains on
    kappas: tuple[float, ...] = (0.0, 1.0, 4.0)  # of mean − κ · std
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 40
    learning_rate: float = 3e-4  # constant
    measure_every: int = 5  # iterations
    workers: int = 2  # parallel runs
    models: Path = Path("runs/ensemble")  # where the reward models are kept; trained if they are not there
    output: Path | None = None  # folder of the results, by default results/
    quick: bool = False


QUICK = dict(members=2, pairs=64, held_out=32, kappas=(4.0,), seeds=(0,), iterations=2, measure_every=1)


def choices(prompts: list[str], count: int, seed: int) -> list[Comparison]:
    """The gold rater's choices between two samples of the supervised model, `count` of them over the prompts."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SUPERVISED), AutoTokenizer.from_pretrained(SUPERVISED)
    drawn = [prompts[index % len(prompts)] for index in range(count) for _ in range(2)]
    samples = sample_responses(model, tokenizer, drawn, seed, temperature=1.0)
    return compare(list(zip(samples[::2], samples[1::2], strict=True)), NOISE, seed)


def train_members(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train the reward models into the folder, unless they are there. Returns their numbers on held-out choices.

    Raises ValueError for models of other settings.
    """
    wanted = {"members": settings.members, "pairs": settings.pairs, "held_out": settings.held_out}
    if (folder / RECORD).is_file():
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if known["settings"] != wanted:
            raise ValueError(f"the models in {folder} are of {known['settings']}, not of {wanted}; remove the folder.")
        return known
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was stopped
    started, tokenizer = time.perf_counter(), AutoTokenizer.from_pretrained(SUPERVISED)
    training, held_out = (
        as_pairs(tokenizer, choices(prompts, count, seed))
        for prompts, count, seed in (
            (train_prompts(), settings.pairs, 7),
            (held_out_prompts(), settings.held_out, 8),
        )
    )
    scores: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for index in range(settings.members):
        config = RewardConfig(learning_rate=1e-3, epochs=2, batch_size=32, max_length=128, seed=index)  # as shipped
        model, _ = load_base(SUPERVISED, config.seed)
        fit(model, training, config)
        save(model, tokenizer, folder / member_name(index))
        for part, kept in zip((training, held_out), scores, strict=True):
            kept.append(head_scores(model, part.sequences()))
    members = [torch.cat(columns, 1) for columns in scores]  # [N, K]
    report = report_of(training, held_out, members)
    print(report.line(), flush=True)
    record = {"settings": wanted, "report": asdict(report), "seconds": time.perf_counter() - started}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def jobs(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """The runs: on the shipped reward model, on one member, and on the ensemble with each κ."""
    ensemble = {f"κ = {kappa:g}": (folder, kappa) for kappa in settings.kappas}
    rewards = {"shipped": (None, None), "one member": (folder / member_name(0), None), **ensemble}
    return [
        {
            "name": name,
            "algorithm": "ppo",
            "seed": seed,
            "measure_every": settings.measure_every,
            "env_arg": ["kl_coef=0", *_arguments(*reward)],
            "train": {
                "iterations": settings.iterations,
                "schedule": "constant",
                "learning_rate": settings.learning_rate,
            },
        }
        for name, reward in rewards.items()
        for seed in settings.seeds
    ]


def _arguments(folder: Path | None, kappa: float | None) -> list[str]:
    if folder is None:
        return []
    parts = ["reference=reviews", f"reward={folder}", "prompts=reviews"]
    return parts if kappa is None else [*parts, f"reward_ensemble={kappa}"]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table of the end of the runs: interquartile means over seeds, with 95% intervals of the gold score."""
    lines = ["| optimized | score | gold score at the end | its highest | KL, nats |", "|---|---|---|---|---|"]
    for name, group in by_name(results).items():
        ends = [row["curve"][-1] for row in group]
        gold = [end["gold"] for end in ends]
        low, high = interval([gold])
        means = [interquartile_mean([end[key] for end in ends]) for key in ("score", "kl_per_response")]
        highest = interquartile_mean([max(point["gold"] for point in row["curve"]) for row in group])
        lines.append(
            f"| {name} | {means[0]:.2f} | {interquartile_mean(gold):.2f} ({low:.2f} to {high:.2f}) | {highest:.2f} | "
            f"{means[1]:.1f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw what is optimized and the gold score over iterations, a line for each seed."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for (name, group), color in zip(by_name(results).items(), COLORS, strict=False):
        for index, row in enumerate(group):
            steps = [point["iteration"] for point in row["curve"]]
            for axis, key in zip(axes, ("score", "gold"), strict=True):
                values = [point[key] for point in row["curve"]]
                axis.plot(steps, values, color=color, marker=".", alpha=0.8, label=name if index == 0 else None)
    for axis, title in zip(axes, ("score: optimized, each run's own", "gold score: true quality"), strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Train the reward models, do all runs, and write the results with a table and a picture."""
    place = rows.folder(settings.output, settings.quick)
    if settings.quick:
        settings = replace(settings, **QUICK, models=place / "models")
    folder = settings.models.absolute()
    record = train_members(settings, folder)
    results = []
    for row in _run_all(jobs(settings, folder), settings.workers):
        results.append(row)
        rows.write("ensembles", results, vars(settings) | {"reward_models": record}, place)
    draw(results, place / "ensembles.png")
    print(f"{table(results)}\nwritten to {place / 'ensembles.json'}")


def _run_all(work: list[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, work)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
