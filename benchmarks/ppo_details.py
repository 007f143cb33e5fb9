"""What each detail of PPO is worth on TextGen-v0: one change at a time from the recipe, over seeds.

`python -m benchmarks.ppo_details`. Read score and gold score together with the KL: a change that only moves further
from the reference has bought nothing. One thread a run, workers side by side.
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
PANELS = (("score", "score"), ("gold", "gold score"), ("kl_per_response", "KL, nats a response"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 12
    workers: int = 2  # runs side by side


def last(group: list[dict[str, Any]], key: str) -> list[float]:
    """A number at the end of each run."""
    return [row["curve"][-1][key] for row in group]


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Interquartile means over seeds with 95% intervals, in Markdown."""
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
    """Every variant's seeds, interquartile mean and interval, in three panels."""
    names = list(groups)[::-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.42 * len(names) + 1.4), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for place, name in enumerate(names):
            values = last(groups[name], key)
            axis.plot(interval([values]), [place] * 2, color="#1f6fb4", linewidth=6, alpha=0.35, solid_capstyle="butt")
            axis.plot(interquartile_mean(values), place, "|", color="#1f6fb4", markersize=14, mew=2.5)
            axis.plot(values, [place] * len(values), ".", color="black", markersize=5, alpha=0.6)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    figure.savefig(rows.RESULTS / "ppo_details.png", dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Runs all, adds them to what was measured before, prints the table and draws the picture."""
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
    found = by_name(rows.measured("ppo_details"))
    groups = {name: found[name] for name in VARIANTS if name in found}
    draw(groups)
    print(table(groups))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
