"""One iteration of PPO on text, here and by TRL 1.12's PPOTrainer: CPU seconds and peak memory, in turns.

`python -m benchmarks.ppo_iteration --trl-python PATH`, where PATH is the interpreter of an environment made by

    python3 -m venv trlenv && trlenv/bin/pip install torch==2.13.0 trl==1.12.0

Each side is a process of its own, on one thread, that does an iteration when told to: rollout, scores, advantages, and
all optimizer steps. Both load the same folders (policy, reward model, from which the critic starts), and have the same
prompts, budget, stop id, epochs, minibatches and optimizer steps, which are counted. The learning rate is so small that
the policy, and with it the length of responses, stays what it was. Peak memory is the resident memory of the whole
process while the iteration runs, weights and libraries included.

Cases: the embedded models on their own task; with a budget of 256 and a stop id at which responses end after a quarter
of it on average; and SmolLM2-135M with 16 responses of 8 + 32 tokens, if there is a folder of it. What differs by
design: TRL clips no gradient, and generates without dropping finished rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks import rows as result_rows
from benchmarks.support import models, ours
from benchmarks.support.measure import PeakMemory, one_thread, ratios, show, table
from textenv.models.loading import quietly
from textenv.reviews.weights import REWARD_MODEL, SUPERVISED
from textenv.task import Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Cases and repeats."""

    trl_python: Path | None = None  # interpreter with TRL 1.12.0; without it this library is measured alone
    smollm2: Path | None = None  # folder of SmolLM2-135M, for the case of that name
    cases: tuple[Literal["ragged", "quarter", "smollm2"], ...] = ("ragged", "quarter", "smollm2")  # cases to run
    repeats: int = 7  # iterations of each side, in turns
    large_repeats: int = 3  # the same for SmolLM2
    warm_up: int = 1  # iterations of each side that do not count
    rows: int = 128  # responses in an iteration; 16 for SmolLM2
    epochs: int = 4  # passes over each rollout
    large_epochs: int = 1  # the same for SmolLM2
    minibatches: int = 4  # optimizer steps in an epoch; 2 for SmolLM2
    budget: int = 256  # tokens, of `quarter`
    trl_forward_rows: int = 128  # TRL's local_rollout_forward_batch_size; its default, 64, takes longer
    # settings of training on this side, NAME=VALUE, added as a second way beside the defaults
    flags: tuple[str, ...] = ()
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {"cases": ("ragged",), "repeats": 1, "rows": 8, "epochs": 1, "minibatches": 2}
NAMES = {
    "ragged": "embedded models, budget 48",
    "quarter": "embedded models, budget 256, mean length a quarter",
    "smollm2": "SmolLM2-135M, 16 x (8 + 32)",
}


def jobs_of(settings: Settings, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The job of every case, by its name."""
    makers = {"ragged": ragged, "quarter": quarter, "smollm2": smollm2}
    cases = [case for case in settings.cases if case != "smollm2" or settings.smollm2]
    if not cases:
        raise SystemExit("the case smollm2 needs a folder of SmolLM2-135M; pass it as --smollm2.")
    for case in cases:
        yield case, makers[case](settings, work)


def job_of(task: Task, settings: Settings, file: Path, **changes: Any) -> dict[str, Any]:
    """A job on the first prompts of a task, written to `file`; the one after them is held out, as training must."""
    rows, held_out = changes.get("rows", settings.rows), file.with_suffix(".held_out.jsonl")
    prompts = task.prompts.select(range(rows + 1))
    lines = [json.dumps({"prompt": text}) + "\n" for text in prompts.texts]
    file.write_text("".join(lines[:rows]), encoding="utf-8")
    held_out.write_text(lines[rows], encoding="utf-8")
    pairs = zip(prompts.input_ids[:rows], prompts.attention_mask[:rows], strict=True)
    return {
        "prompts": str(file),
        "held_out": str(held_out),
        "prompt_ids": [ids[mask].tolist() for ids, mask in pairs],
        "prompt_width": int(prompts.attention_mask.sum(1).max()),
        "response": task.config.max_new_tokens,
        "temperature": task.config.temperature,
        "kl_coef": task.config.kl_coef,
        "rows": rows,
        "epochs": settings.epochs,
        "minibatches": settings.minibatches,
        "iterations": 1000,  # the benchmark ends them
        "learning_rate": 1e-9,
        "trl_forward_rows": settings.trl_forward_rows,
    } | changes


def ragged(settings: Settings, work: Path) -> dict[str, Any]:
    """The embedded task as it is."""
    parts = {"policy": str(SUPERVISED), "reward": str(REWARD_MODEL), "stop": 0, "pad": 1}
    return job_of(models.embedded_task(), settings, work / "ragged.jsonl", **parts)


def quarter(settings: Settings, work: Path) -> dict[str, Any]:
    """The embedded models with positions for the budget, and a stop id at which a quarter of it is used."""
    width = 24 + settings.budget
    policy, reward = work / "policy", work / "reward"
    for source, target in ((SUPERVISED, policy), (REWARD_MODEL, reward)):
        models.with_positions(source, target, width)
    task = models.embedded_task(
        reference=str(policy), reward=str(reward), prompts="reviews", max_new_tokens=settings.budget, stop_token_ids=[1]
    )
    assert task.reference is not None
    sample = task.prompts.select(range(128))
    written = ours.write(task, task.reference.model, sample, torch.Generator().manual_seed(0))
    stop = models.stop_for_mean(written.state.response_ids, task.vocabulary, settings.budget / 4)
    parts = {"policy": str(policy), "reward": str(reward), "stop": stop, "pad": 1}
    return job_of(task, settings, work / "quarter.jsonl", **parts)


def smollm2(settings: Settings, work: Path) -> dict[str, Any]:
    """SmolLM2-135M with a reward model of random head, and a stop id that it hardly ever writes."""
    language = models.language_model(models.SMOLLM2, settings.smollm2, (0,))
    with quietly():
        models.classifier(language.model).save_pretrained(work / "scorer")
        language.tokenizer.save_pretrained(work / "scorer")
    stop = models.least_likely_id(language.model)
    del language
    task = models.embedded_task(
        reference=str(settings.smollm2),
        reward=str(work / "scorer"),
        prompts=[f"Some words about the number {number}" for number in range(10, 27)],
        max_prompt_tokens=8,
        max_new_tokens=32,
        stop_token_ids=[stop],
        temperature=1.0,
    )
    parts = {"policy": str(settings.smollm2), "reward": str(work / "scorer"), "stop": stop, "pad": 0}
    return job_of(task, settings, work / "smollm2.jsonl", rows=16, epochs=settings.large_epochs, minibatches=2, **parts)


class Side:
    """A process that does an iteration when told to."""

    def __init__(self, command: list[str], job: dict[str, Any], file: Path) -> None:
        file.write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = file.with_suffix(".log")
        self.process = subprocess.Popen(
            [*command, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w", encoding="utf-8"),
            encoding="utf-8",
            env=environment,
            cwd=result_rows.HERE.parent,
        )
        self.ready = self._answer()
        self.rows: list[dict[str, Any]] = []

    def iterate(self) -> dict[str, Any]:
        """One iteration, with its peak memory."""
        assert self.process.stdin is not None
        with PeakMemory(self.process.pid) as memory:
            print("iterate", file=self.process.stdin, flush=True)
            row = self._answer()
        return row | {"peak_bytes": memory.peak}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"{self.process.args} failed:\n{self.log.read_text(encoding='utf-8')[-3000:]}")


@contextmanager
def sides_of(job: dict[str, Any], settings: Settings, work: Path) -> Iterator[dict[str, Side]]:
    """The processes of all sides, which end with the block."""
    here = [sys.executable, "-m", "benchmarks.support.ppo_ours"]
    commands = {"ours": (here, ())} | ({"ours, with flags": (here, settings.flags)} if settings.flags else {})
    if settings.trl_python:
        commands["trl"] = ([str(settings.trl_python), str(result_rows.HERE / "support" / "ppo_trl.py")], ())
    sides: dict[str, Side] = {}
    try:
        for number, (name, (command, flags)) in enumerate(commands.items()):
            sides[name] = Side(command, job | {"flags": flags}, work / f"job{number}.json")
        yield sides
    finally:
        for side in sides.values():
            side.process.kill()
            side.process.wait()


def measure(case: str, job: dict[str, Any], settings: Settings, work: Path) -> dict[str, Any]:
    """One row of the table."""
    with sides_of(job, settings, work) as sides:
        assert len({side.ready["prompt_tokens"] for side in sides.values()}) == 1, "the prompts differ"
        repeats = settings.large_repeats if case == "smollm2" else settings.repeats
        for turn in range(settings.warm_up + repeats):
            for side in sides.values():
                row = side.iterate()
                if turn >= settings.warm_up:
                    side.rows.append(row)
        steps = {row["optimizer_steps"] for side in sides.values() for row in side.rows}
        assert steps == {job["epochs"] * job["minibatches"]}, f"the optimizer steps differ: {steps}"
    result: dict[str, Any] = {"case": case, "optimizer_steps": job["epochs"] * job["minibatches"]}
    # Names of files are this machine's own.
    result |= {"job": {key: value for key, value in job.items() if isinstance(value, int | float)}}
    for name, side in sides.items():
        result[name] = {
            "seconds": median(row["seconds"] for row in side.rows),
            "clock_seconds": median(row["clock_seconds"] for row in side.rows),
            "peak_bytes": max(row["peak_bytes"] for row in side.rows),
            "mean_length": mean(row["mean_length"] for row in side.rows),
            "all": side.rows,
            "ready": side.ready,
        }
    for name in [name for name in sides if name != "trl" and "trl" in sides]:
        for key in ("seconds", "clock_seconds"):
            theirs, own = ([row[key] for row in sides[side].rows] for side in ("trl", name))
            result[f"trl / {name}, {key}"] = ratios(theirs, own)
        result[f"{name} / trl, memory"] = result[name]["peak_bytes"] / result["trl"]["peak_bytes"]
    return result


def lines_of(results: list[dict[str, Any]]) -> str:
    """The table of all cases."""
    header = ["case", "side", "steps", "mean length", "seconds", "peak GB", "TRL / ours: time", "on the clock"]
    lines = []
    for row in results:
        for name in ("ours", "ours, with flags", "trl"):
            if name not in row:
                continue
            side = row[name]
            keys = [f"trl / {name}, {key}" for key in ("seconds", "clock_seconds")]
            numbers = [show(row[key]) if key in row else "" for key in keys]
            memory = f"{side['peak_bytes'] / 1e9:.2f}"
            memory += f" ({row[f'{name} / trl, memory']:.2f})" if f"{name} / trl, memory" in row else ""
            length, seconds = f"{side['mean_length']:.1f}", f"{side['seconds']:.2f}"
            lines.append([NAMES[row["case"]], name, row["optimizer_steps"], length, seconds, memory, *numbers])
    return table(header, lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory of every case, side by side."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = (("seconds", 1.0, "CPU seconds an iteration, one thread"), ("peak_bytes", 1e9, "peak memory, GB"))
    sides = [name for name in ("ours", "ours, with flags", "trl") if name in results[0]]
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, side in enumerate(sides):
            places = [number + 0.8 * (index + 0.5) / len(sides) - 0.4 for number in range(len(results))]
            bars = axes.bar(places, [row[side][key] / unit for row in results], 0.7 / len(sides), label=side)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.set_xticks(range(len(results)), [NAMES[row["case"]].replace(", ", ",\n") for row in results], fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    """Measure every case and print the table."""
    one_thread()
    settings = replace(settings, **QUICK) if settings.quick else settings
    with tempfile.TemporaryDirectory() as work:
        measured = (measure(case, job, settings, Path(work)) for case, job in jobs_of(settings, Path(work)))
        result_rows.report("ppo_iteration", measured, settings, lines_of, draw)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
