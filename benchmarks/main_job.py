"""The main job over several seeds: score, gold score, KL, time and memory. `python -m benchmarks.main_job`

Each seed runs the command line in a process of its own, so time and peak memory are those of a user's run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import psutil
import tyro

from benchmarks import rows
from benchmarks.support.start import command

KEYS = (
    "score_before",
    "score_after",
    "score_std_before",
    "gold_before",
    "gold_after",
    "kl_per_response",
    "length_before",
    "length_after",
    "distinct_bigrams_before",
    "distinct_bigrams_after",
    "tokens",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Selection and size of the runs."""

    seeds: tuple[int, ...] = (0, 1, 2)  # one run each
    precision: Literal["float32", "bf16"] = "float32"  # of the runs; bf16 has a file of results of its own
    ranks: int = 1  # processes of torchrun, of one thread each; more than one have a file of results too


def run_seed(seed: int, settings: Settings, folder: Path) -> dict:
    """Run one seed; returns its summary, wall time in seconds and the peak memory of a process in GB."""
    flags = ["--seed", str(seed), "--precision", settings.precision, "--run", str(folder)]
    ranks = settings.ranks if settings.ranks > 1 else None
    threads = {"OMP_NUM_THREADS": "1"} if settings.ranks > 1 else {}
    started = time.perf_counter()
    process = subprocess.Popen(command("agents", "train", *flags, ranks=ranks), env=os.environ | threads)
    monitored, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            processes = [monitored, *monitored.children(recursive=True)]
            peak = max(peak, *(each.memory_info().rss for each in processes))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"seed {seed} failed with exit code {process.returncode}.")
    wall = time.perf_counter() - started
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    row = {"seed": seed} | {key: summary[key] for key in KEYS}
    row["gain_in_deviations"] = (row["score_after"] - row["score_before"]) / row["score_std_before"]
    return row | {"wall_seconds": round(wall, 1), "peak_gb": round(peak / 1e9, 2)}


def main(settings: Settings) -> None:
    """Run every seed and print the table."""
    plain = settings.precision == "float32" and settings.ranks == 1
    parts = [f"_{settings.precision}"] * (settings.precision != "float32") + ["_ranks"] * (settings.ranks > 1)
    results, name = [], "main_job" + "".join(parts)
    train = f"the command line's defaults, precision {settings.precision}, {settings.ranks} processes"
    with tempfile.TemporaryDirectory() as work:
        for seed in settings.seeds:
            results.append(run_seed(seed, settings, Path(work) / f"seed{seed}"))
            path = rows.write(name, results, {"seeds": settings.seeds, "train": train})
        if plain:
            for picture in ("curves", "credit"):
                source = Path(work) / f"seed{settings.seeds[0]}" / f"{picture}.png"
                shutil.copy(source, rows.RESULTS / f"main_job_{picture}.png")
    for key in (*KEYS, "gain_in_deviations", "wall_seconds", "peak_gb"):
        values = [row[key] for row in results]
        spread = stdev(values) if len(values) > 1 else 0.0
        print(f"{key:20} {mean(values):10.2f} +- {spread:.2f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
