"""The benchmark of baselines: its jobs, its picture, and, slow, the whole at the smallest sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import baselines


def test_jobs_and_picture(tmp_path: Path) -> None:
    """Every method has a job for every seed and β; points of all seeds are one point, in order of the KL."""
    jobs = baselines.jobs(baselines.Settings(seeds=(0, 1), betas=(0.1, 0.2)))
    assert len(jobs) == 2 * (1 + 3 * 2) and sum(job["method"] == "best-of-n" for job in jobs) == 2
    words = baselines.command(jobs[3], tmp_path, quick=False)
    assert words[2:4] == ["agents", "dpo"] and words[words.index("--loss") + 1] == "ipo" and "kl_coef=0.1" in words
    results = [
        {"method": "dpo", "seed": seed, "beta": beta, "kl": 1 / beta + seed, "score": 1.0, "gold": 2.0}
        for seed in (0, 1)
        for beta in (0.1, 0.2)
    ] + [{"method": "best-of-n", "seed": 0, "beta": None, "n": n, "kl": n / 2, "score": n, "gold": 1} for n in (1, 2)]
    groups = baselines.grouped(results)
    assert [[row["kl"] for row in point] for point in groups["dpo"]] == [[5.0, 6.0], [10.0, 11.0]]
    lines = baselines.lines_of(results).splitlines()
    assert len(lines) == 4 and lines[0].startswith("dpo β=0.2") and "5.50 (5.00 to 6.00)" in lines[0]
    baselines.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_smallest_benchmark(tmp_path: Path) -> None:
    """Every method runs by the command line and leaves its points."""
    baselines.main(baselines.Settings(seeds=(0,), betas=(0.1,), workers=1, quick=True, output=tmp_path))
    rows = json.loads((tmp_path / "baselines.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["best-of-n"] * 3 + ["dpo", "ipo", "ppo"]
    bounds, learned = [row["kl"] for row in rows[1:3]], [row["kl"] for row in rows[3:]]
    assert all(kl > 0 for kl in bounds)
    assert all(math.isfinite(kl) and kl != 0 for kl in learned)  # an estimate from samples may be below 0 by chance
    assert (tmp_path / "baselines.png").exists()
