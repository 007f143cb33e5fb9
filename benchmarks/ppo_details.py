"""Ablations of PPO on TextGen-v0: one change at a time from the defaults, over several seeds.

`python -m benchmarks.ppo_details`. Read score and gold score together with the KL: a higher score at a proportionally
higher KL is no improvement. Each run has one thread; `workers` runs are in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot

from benchmarks import rows
from benchmarks.statistics import interquartile_mean, interval
from benchmarks.text_jobs import by_name, run_all

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "critic from the reference": {"settings": {"critic": "reference"}},
    "critic from scratch": {"settings": {"critic": "scratch"}},
    "no whitening": {"algorithm_settings": {"whiten": False}},
    "no value clip": {"algorithm_settings": {"value_clip": 0.0}},
    "KL in the loss (k2)": {"algorithm_settings": {"kl_loss": "k2"}},
    "no KL at all": {"env_arg": ["kl_coef=0"]},
    "λ = 1": {"algorithm_settings": {"lmbda": 1.0}},
    "λ = 0": {"algorithm_settings": {"lmbda": 0.0}},
}
PANELS = (("score", "score"), ("gold", "gold score"), ("kl_per_response", "KL, nats per response"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Selection and size of the runs."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 12
    workers: int = 2  # parallel runs


def last(group: list[dict[str, Any]], key: str) -> list[float]:
    """The final value of a metric in each run."""
    return [row["curve"][-1][key] for row in group]


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown table of interquartile means over seeds with 95% intervals."""
    lines = ["| PPO with | " + " | ".join(title for _, title in PANELS) + " | seeds |", "|---|---|---|---|---|"]
    for name, group in groups.items():
        cells = []
        for key, _ in PANELS:
            values = last(group, key)
            low, high = interval([values])
            cells.append(f"{interquartile_mean(values):.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(group)} |")
    return "\n".join(lines)


def draw(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Draw seeds, interquartile mean and interval of every variant, one panel per metric."""
    names = list(groups)[::-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.42 * len(names) + 1.4), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for position, name in enumerate(names):
            values = last(groups[name], key)
            axis.plot(
                interval([values]), [position] * 2, color="#1f6fb4", linewidth=6, alpha=0.35, solid_capstyle="butt"
            )
            axis.plot(interquartile_mean(values), position, "|", color="#1f6fb4", markersize=14, mew=2.5)
            axis.plot(values, [position] * len(values), ".", color="black", markersize=5, alpha=0.6)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    figure.savefig(rows.RESULTS / "ppo_details.png", dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Run everything, add the rows to the results file, print the table and draw the figure."""
    jobs = [
        {
            "name": name,
            "algorithm": "ppo",
            "seed": seed,
            "measure_every": 6,
            "train": {"iterations": settings.iterations},
        }
        | VARIANTS[name]
        for name in settings.variants
        for seed in settings.seeds
    ]
    run_all("ppo_details", jobs, settings.workers)
    by_variant = by_name(rows.read_rows("ppo_details"))
    groups = {name: by_variant[name] for name in VARIANTS if name in by_variant}
    draw(groups)
    print(table(groups))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
