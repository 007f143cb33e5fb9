"""DPO, best-of-n and PPO on one picture: score and gold score against the KL. `python -m benchmarks.baselines`

Each runs by the command line in a process of its own, on the embedded task, over several seeds. PPO and DPO run at
several β, best-of-n at every n up to 64. All are measured on the same held-out prompts by the same evaluation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from matplotlib import pyplot

from agents.baselines.frontier import COLORS, PANELS
from benchmarks import rows

NUMBERS = ("score_before", "score_after", "gold_before", "gold_after", "kl_per_response", "length_after", "seconds")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Selection and size of the runs."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # one run of each method at each β, and one set of samples
    betas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)  # β of PPO, DPO and IPO
    methods: tuple[str, ...] = ("best-of-n", "dpo", "ipo", "ppo")
    workers: int = 2  # jobs at a time, of one thread each
    output: Path | None = None  # folder for the results; default: benchmarks/results, or a temporary one if quick
    quick: bool = False  # the smallest sizes, to see that it runs


def command(job: dict[str, Any], folder: Path, quick: bool) -> list[str]:
    """The command line of a job: its method, seed and β."""
    small = {
        "best-of-n": ["--samples", "4", "--evaluation-prompts", "4"],
        "dpo": ["--pairs", "24", "--batch-size", "8", "--evaluation-prompts", "4"],
        "ppo": ["--iterations", "2", "--rollout-size", "8", "--minibatch-size", "8", "--evaluation-prompts", "4"],
    }
    kind = "dpo" if job["method"] == "ipo" else job["method"]
    flags = ["--run" if kind == "ppo" else "--output", str(folder), "--seed", str(job["seed"])]
    if job["beta"] is not None:
        flags += ["--env-arg", f"kl_coef={job['beta']}"]
    if kind == "dpo":
        flags += ["--loss", job["method"]]
    verb = "train" if kind == "ppo" else kind
    return [sys.executable, "-m", "agents", verb, *flags, *(small[kind] if quick else [])]


def run(job: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Run a job; returns its rows, points with `kl`, `score` and `gold`."""
    folder, started = Path(tempfile.mkdtemp(prefix="baselines-")), time.perf_counter()
    result = subprocess.run(
        command(job, folder / "out", quick),
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if result.returncode:
        raise SystemExit(f"{job} failed:\n{result.stderr[-2000:]}")
    wall = {"wall_seconds": time.perf_counter() - started}
    if job["method"] == "best-of-n":
        found = json.loads((folder / "out" / "best_of_n.json").read_text(encoding="utf-8"))["rows"]
        points = [job | row | wall for row in found]
    else:
        summary = json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))
        numbers = {name: summary[name] for name in NUMBERS}
        ends = {"kl": summary["kl_per_response"], "score": summary["score_after"], "gold": summary["gold_after"]}
        points = [job | ends | numbers | wall]
    shutil.rmtree(folder)
    return points


def jobs(settings: Settings) -> list[dict[str, Any]]:
    """All jobs, seed by seed."""
    found = []
    for seed in settings.seeds:
        for method in settings.methods:
            betas = (None,) if method == "best-of-n" else settings.betas
            found += [{"method": method, "seed": seed, "beta": beta} for beta in betas]
    return found


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of all jobs as they finish, in order."""
    with ThreadPoolExecutor(settings.workers) as pool:
        for points in pool.map(lambda job: run(job, settings.quick), jobs(settings)):
            yield from points


def grouped(results: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Method -> its points in order of the mean KL, each a list of rows, one for each seed."""
    groups: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for row in results:
        groups.setdefault(row["method"], {}).setdefault(row.get("n", row["beta"]), []).append(row)
    return {
        method: sorted(points.values(), key=lambda point: mean(row["kl"] for row in point))
        for method, points in groups.items()
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Means over seeds against the mean KL, with every seed as a faint dot."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(6.5 * len(PANELS), 4.8), layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS, strict=True):
        for number, (method, points) in enumerate(grouped(results).items()):
            color, marker = COLORS[number % len(COLORS)], "os^D"[number % 4]
            means = [(mean(row["kl"] for row in point), mean(row[metric] for row in point)) for point in points]
            axis.plot(*zip(*means, strict=True), color=color, marker=marker, markersize=5, label=method)
            for point, place in zip(points, means, strict=True):
                axis.plot([row["kl"] for row in point], [row[metric] for row in point], ".", color=color, alpha=0.3)
                first = point[0]
                label = str(first["n"]) if "n" in first else f"β {first['beta']:g}"
                axis.annotate(label, place, xytext=(4, -10), textcoords="offset points", fontsize=7, color=color)
        axis.set(title=title, xlabel="KL to the reference, nats a response (best of n: at most)", ylabel=metric)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines_of(results: list[dict[str, Any]]) -> str:
    """A table line for each method at each β or n: means over the seeds, lowest and highest."""
    lines = []
    for method, points in grouped(results).items():
        for point in points:
            first = point[0]
            name = f"{method} n={first['n']}" if "n" in first else f"{method} β={first['beta']:g}"
            cells = []
            for metric in ("kl", "score", "gold"):
                values = [row[metric] for row in point]
                cells.append(f"{metric} {mean(values):5.2f} ({min(values):.2f} to {max(values):.2f})")
            lines.append(f"{name:16} {'  '.join(cells)}  {len(point)} seeds")
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Measure, write baselines.json and draw baselines.png."""
    rows.report("baselines", measure(settings), settings, lines_of, draw)


if __name__ == "__main__":
    main(tyro.cli(Settings))
