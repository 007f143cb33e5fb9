"""Parallel runs on TextGen-v0, each in a process of its own, saved as JSON rows when they finish."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import rows


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process; returns its row, with the job's `name` and `seed`."""
    command = [sys.executable, "-m", "benchmarks.text_run", json.dumps(job)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=rows.HERE.parent)
    if result.returncode:
        raise SystemExit(f"{job} failed:\n{result.stderr[-2000:]}")
    row = {"name": job["name"], "seed": job["seed"]} | json.loads(result.stdout.splitlines()[-1])
    last = row["curve"][-1]
    print(
        f"{job['name']} seed {job['seed']}: score {last['score']:+.2f}  gold {last['gold']:+.2f}  "
        f"KL {last['kl_per_response']:.1f}  {row['wall_seconds']:.0f} s",
        flush=True,
    )
    return row


def run_all(file: str, jobs: Iterable[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Run all jobs and add them to results/FILE.json, replacing rows of the same name and seed; returns all rows."""
    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(run, jobs):
            rows.add(file, row, ("name", "seed"), {})
    return rows.read_rows(file)


def by_name(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows grouped by name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault(row["name"], []).append(row)
    return groups
