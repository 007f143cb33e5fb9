"""All algorithms on TextGen-v0 at equal tokens: score, gold score, KL, and the frontier of score against KL.

`python -m benchmarks.algorithms`. Longer runs also show over-optimization: proxy and gold score against √KL for several
penalty weights (Gao et al. 2023). Each run has one thread; `workers` runs are in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import tyro
from matplotlib import pyplot

from agents.algorithms.registry import ALGORITHMS
from benchmarks import rows
from benchmarks.statistics import interquartile_mean, interval
from benchmarks.text_jobs import by_name, run_all

COLORS = ("#1f6fb4", "#e08a1e", "#2e8b57", "#c23b3b", "#7a4fb5", "#8c6d46", "#d26ab0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Selection and size of the runs."""

    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 23_000  # token budget at which the table compares
    iterations: int = 12  # enough for the token budget
    kl_coefs: tuple[float, ...] = (0.02, 0.1)  # of the longer runs; empty skips them
    long_iterations: int = 60
    workers: int = 2  # parallel runs


def at(row: dict[str, Any], tokens: int) -> dict[str, float]:
    """Every number of a run's curve at a token count, interpolated linearly."""
    token_counts = [point["tokens"] for point in row["curve"]]
    if token_counts[-1] < tokens:
        raise ValueError(
            f"{row['name']} seed {row['seed']} saw {token_counts[-1]} tokens, fewer than {tokens}; raise iterations."
        )
    names = row["curve"][0].keys() - {"tokens"}
    return {name: float(np.interp(tokens, token_counts, [point[name] for point in row["curve"]])) for name in names}


def table(results: list[dict[str, Any]], tokens: int) -> str:
    """Markdown table of interquartile means over seeds at equal tokens, with 95% intervals of the scores."""
    lines = [f"| at {tokens:,} tokens | score | gold score | KL, nats | seconds | seeds |", "|---|---|---|---|---|---|"]
    for name, group in by_name(results).items():
        points = [at(row, tokens) for row in group]
        cells = []
        for key in ("score", "gold"):
            values = [point[key] for point in points]
            low, high = interval([values])
            cells.append(f"{interquartile_mean(values):.2f} ({low:.2f} to {high:.2f})")
        kl = interquartile_mean([point["kl_per_response"] for point in points])
        # A row with a note was paused by hand, so its time does not count.
        seconds = np.median([at(row, tokens)["seconds"] for row in group if "note" not in row])
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {kl:.1f} | {seconds:.0f} | {len(group)} |")
    return "\n".join(lines)


def draw_frontier(results: list[dict[str, Any]]) -> None:
    """Plot score and gold score of every run against its KL."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for (name, group), color in zip(by_name(results).items(), COLORS, strict=False):
        for index, row in enumerate(group):
            kl = [max(point["kl_per_response"], 0.0) for point in row["curve"]]
            for axis, key in zip(axes, ("score", "gold"), strict=True):
                values = [point[key] for point in row["curve"]]
                label = name if index == 0 else None
                axis.plot(kl, values, color=color, linewidth=1.2, marker=".", alpha=0.8, label=label)
    for axis, title in zip(axes, ("score: optimized", "gold score: true quality"), strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("KL to the reference, nats per response")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(rows.RESULTS / "algorithms_frontier.png", dpi=110)
    pyplot.close(figure)


def draw_over_optimization(results: list[dict[str, Any]]) -> None:
    """Plot proxy and gold score against √KL, one panel per penalty weight."""
    groups = by_name(results)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(5.2 * len(groups), 4.4), squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        for index, row in enumerate(group):
            root = [max(point["kl_per_response"], 0.0) ** 0.5 for point in row["curve"]]
            for key, label, color in (("score", "proxy", COLORS[0]), ("gold", "gold", COLORS[1])):
                start = row["curve"][0][key]
                values = [point[key] - start for point in row["curve"]]
                axis.plot(root, values, color=color, marker=".", alpha=0.8, label=label if index == 0 else None)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("√KL, √nats per response")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("gain over the reference")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(rows.RESULTS / "over_optimization.png", dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Run everything, add the rows to the results file, print the table and draw both figures."""
    jobs = [
        {
            "name": name,
            "algorithm": name,
            "seed": seed,
            "measure_every": 4,
            "train": {"iterations": settings.iterations},
        }
        for name in settings.algorithms
        for seed in settings.seeds
    ]
    run_all("algorithms", jobs, settings.workers)
    draw_frontier(rows.read_rows("algorithms"))
    print(table(rows.read_rows("algorithms"), settings.tokens))
    long = [
        {
            "name": f"kl_coef {coef:g}",
            "algorithm": "ppo",
            "seed": seed,
            "env_arg": [f"kl_coef={coef}"],
            "train": {"iterations": settings.long_iterations, "schedule": "constant"},
        }
        for coef in settings.kl_coefs
        for seed in settings.seeds
    ]
    if long:
        run_all("over_optimization", long, settings.workers)
        draw_over_optimization(rows.read_rows("over_optimization"))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
