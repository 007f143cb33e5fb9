"""How much faster a run gets with more processes: tokens a second of 1 and of N under torchrun, in turns.

`python -m benchmarks.ranks`, with `--smollm2 FOLDER` also for SmolLM2-135M. Each process has one thread, and all are on
this machine. Seconds are of the clock, and of whole iterations: rollout, scores, advantages and all optimizer steps.
Efficiency is the speed of N over that of one, divided by N. Alone, one process runs the same code without torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from benchmarks import rows as result_rows
from benchmarks.support.measure import ratios, show, table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats."""

    ranks: int = 2  # processes beside one
    smollm2: Path | None = None  # folder of SmolLM2-135M
    repeats: int = 3  # runs of each number of processes, in turns
    iterations: int = 4  # of each run; the first does not count
    rows: int = 128  # responses of an iteration
    large_rows: int = 32  # the same for SmolLM2-135M, with 8 + 32 tokens each
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {"repeats": 1, "iterations": 2, "rows": 16}


def jobs_of(settings: Settings, work: Path) -> dict[str, list[str]]:
    """The flags of training, by the name of the model."""
    shared = ["--iterations", str(settings.iterations), "--evaluation-prompts", "8", "--env-arg", "device=cpu"]
    quarter = settings.rows // 4
    jobs = {"embedded": ["--rollout-size", str(settings.rows), "--minibatch-size", str(quarter), *shared]}
    if settings.smollm2 is not None:
        prompts = work / "prompts.jsonl"
        lines = (json.dumps({"prompt": f"Some words about the number {number}"}) for number in range(10, 80))
        prompts.write_text("\n".join(lines), encoding="utf-8")
        arguments = {
            "reference": settings.smollm2,
            "reward": "textenv.rewards.library:length",
            "prompts": prompts,
            "max_prompt_tokens": 8,
            "max_new_tokens": 32,
        }
        task = [part for name, value in arguments.items() for part in ("--env-arg", f"{name}={value}")]
        large, half = settings.large_rows, settings.large_rows // 2
        sizes = ["--rollout-size", str(large), "--minibatch-size", str(half), "--epochs", "1"]
        jobs["SmolLM2-135M"] = [*sizes, *task, *shared]
    return jobs


def run_job(flags: list[str], ranks: int, folder: Path) -> dict[str, Any]:
    """Train in some processes; returns medians over the iterations after the first."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [
        sys.executable,
        *start,
        "-m",
        *(["--"] if start else []),
        "agents",
        "train",
        *flags,
        "--run",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=result_rows.HERE.parent, capture_output=True, encoding="utf-8", check=False
    )
    if ended.returncode:
        raise SystemExit(f"{command} failed:\n{ended.stderr[-3000:]}")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    numbers = {"seconds": "seconds", "rollout_seconds": "rollout_seconds", "tokens": "tokens_per_second"}
    return {name: median(row[key] for row in metrics) for name, key in numbers.items()}


def main(settings: Settings) -> None:
    """Run all jobs in turns and print the table."""
    settings = replace(settings, **QUICK) if settings.quick else settings
    results, lines = [], []
    with tempfile.TemporaryDirectory() as work:
        for name, flags in jobs_of(settings, Path(work)).items():
            turns = [
                {ranks: run_job(flags, ranks, Path(work) / f"{name}-{ranks}-{turn}") for ranks in (1, settings.ranks)}
                for turn in range(settings.repeats)
            ]
            speed = ratios([turn[1]["seconds"] for turn in turns], [turn[settings.ranks]["seconds"] for turn in turns])
            results.append({"model": name, "speedup": speed, "turns": turns})
            seconds = [median(turn[ranks]["seconds"] for turn in turns) for ranks in (1, settings.ranks)]
            efficiency = speed["median"] / settings.ranks
            lines.append([name, *(f"{each:.2f}" for each in seconds), show(speed), f"{efficiency:.0%}"])
    header = ["model", "seconds alone", f"seconds of {settings.ranks}", "speedup", "efficiency"]
    print(table(header, lines))
    place = result_rows.folder(settings.output, settings.quick)
    path = result_rows.write("ranks", results, vars(settings), place)
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
