"""How much faster a run gets with more processes: tokens a second of 1 and of N under torchrun, in turns.

`python -m benchmarks.ranks`, with `--smollm2 FOLDER` also for SmolLM2-135M. Each process has one thread, and all are on
this machine. Seconds are of the clock, and of whole iterations: rollout, scores, advantages and all optimizer steps.
Efficiency is the speed of N over that of one, divided by N. Alone, one process runs the same code without torchrun.
Memory is that of the rank that holds most, for one process, for N, and for N with `--shard full`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from benchmarks import rows as result_rows
from benchmarks.support.measure import ratios, show, table
from benchmarks.support.start import command as start_command


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
    memory: bool = True  # measure memory too, with and without --shard full
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {"repeats": 1, "iterations": 2, "rows": 16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained."""

    env_arg: tuple[str, ...]
    rollout_size: int
    minibatch_size: int
    epochs: int

    def flags(self, iterations: int) -> list[str]:
        """Of `agents train`."""
        named = {"rollout-size": self.rollout_size, "minibatch-size": self.minibatch_size, "epochs": self.epochs}
        named |= {"iterations": iterations, "evaluation-prompts": 8}
        flags = [part for name, value in named.items() for part in (f"--{name}", str(value))]
        return [*flags, *(part for each in self.env_arg for part in ("--env-arg", each))]


def jobs_of(settings: Settings, work: Path) -> dict[str, Job]:
    """What is trained, by the name of the model."""
    rows, large = settings.rows, settings.large_rows
    jobs = {"embedded": Job(env_arg=("device=cpu",), rollout_size=rows, minibatch_size=rows // 4, epochs=4)}
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
        task = ("device=cpu", *(f"{name}={value}" for name, value in arguments.items()))
        jobs["SmolLM2-135M"] = Job(env_arg=task, rollout_size=large, minibatch_size=large // 2, epochs=1)
    return jobs


def run_job(job: Job, iterations: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Train in some processes; returns medians over the iterations after the first."""
    start(ranks, "agents", "train", *job.flags(iterations), "--run", str(folder))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    numbers = {"seconds": "seconds", "rollout_seconds": "rollout_seconds", "tokens": "tokens_per_second"}
    return {name: median(row[key] for row in metrics) for name, key in numbers.items()}


def run_memory(job: Job, ranks: int, shard: str, folder: Path) -> dict[str, Any]:
    """Bytes of the rank that holds most, by what they are for."""
    folder.mkdir()
    settings = vars(job) | {"shard": shard, "output": str(folder)}
    (folder / "job.json").write_text(json.dumps(settings), encoding="utf-8")
    start(ranks, "benchmarks.support.shards", str(folder / "job.json"))
    found = [json.loads((folder / f"{index}.json").read_text(encoding="utf-8")) for index in range(ranks)]
    return {name: max(each[name] for each in found) for name in found[0]}


def start(ranks: int, module: str, *arguments: str) -> None:
    """Run a module in one process, or in several of torchrun, with a thread each."""
    command = start_command(module, *arguments, ranks=ranks if ranks > 1 else None)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=result_rows.HERE.parent, capture_output=True, encoding="utf-8", check=False
    )
    if ended.returncode:
        raise SystemExit(f"{command} failed:\n{ended.stderr[-3000:]}")


def main(settings: Settings) -> None:
    """Run all jobs in turns and print the table."""
    settings = replace(settings, **QUICK) if settings.quick else settings
    results, lines, memory = [], [], []
    with tempfile.TemporaryDirectory() as work:
        for name, job in jobs_of(settings, Path(work)).items():
            turns = [
                {
                    ranks: run_job(job, settings.iterations, ranks, Path(work) / f"{name}-{ranks}-{turn}")
                    for ranks in (1, settings.ranks)
                }
                for turn in range(settings.repeats)
            ]
            speed = ratios([turn[1]["seconds"] for turn in turns], [turn[settings.ranks]["seconds"] for turn in turns])
            results.append({"model": name, "speedup": speed, "turns": turns})
            if settings.memory:
                cases = ((1, "none"), (settings.ranks, "none"), (settings.ranks, "full"))
                for ranks, shard in cases:
                    found = run_memory(job, ranks, shard, Path(work) / f"{name}-{ranks}-{shard}")
                    memory.append({"model": name, "ranks": ranks, "shard": shard, **found})
            seconds = [median(turn[ranks]["seconds"] for turn in turns) for ranks in (1, settings.ranks)]
            efficiency = speed["median"] / settings.ranks
            lines.append([name, *(f"{each:.2f}" for each in seconds), show(speed), f"{efficiency:.0%}"])
    header = ["model", "seconds alone", f"seconds of {settings.ranks}", "speedup", "efficiency"]
    print(table(header, lines))
    if memory:
        named = ("model", "ranks", "shard")
        cells = [[str(row[key]) if key in named else f"{row[key] / 1e6:.0f} MB" for key in row] for row in memory]
        print(table(list(memory[0]), cells))
    place = result_rows.folder(settings.output, settings.quick)
    path = result_rows.write("ranks", [*results, *memory], vars(settings), place)
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
