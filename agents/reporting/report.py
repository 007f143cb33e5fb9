"""Output of a run: scalars, a progress bar, and a description of the machine."""

from __future__ import annotations

import json
import math
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agents.reporting.files import is_number, read_json_lines
from textenv.training.files import write_text

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium", "transformers")


class Scalars:
    """Metrics of every iteration, written to metrics.jsonl."""

    def __init__(self, folder: Path, resume_at: int, total: int) -> None:
        """resume_at: the last iteration to keep; later rows were written after the last checkpoint.

        total: iterations of the run.
        """
        self.path, known = folder / METRICS, read_metrics(folder, total)
        self.rows = [row for row in known if 0 < row["iteration"] <= resume_at]
        # The last iteration that had been written, perhaps after the checkpoint.
        self.reported = known[-1]["iteration"] if known else 0
        self.lost = resume_at - len(self.rows)  # iterations whose metrics could not be read any more
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append the metrics of an iteration."""
        row = {"iteration": iteration} | metrics
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path, total: float = math.inf) -> list[dict[str, Any]]:
    """The metrics of every iteration that can be read, in order; the last row of an iteration counts.

    A value that is no finite number is left out of its row. total: iterations of the run; a row of a later one is
    damaged.
    """
    found = [row for row in read_json_lines(folder / METRICS) if type(row.get("iteration")) is int]
    rows = {row["iteration"]: row for row in found if 0 <= row["iteration"] <= total}
    return [{name: value for name, value in rows[at].items() if is_number(value)} for at in sorted(rows)]


def finished_summary(folder: Path, iterations: int) -> dict[str, Any] | None:
    """The summary of a run that has ended after this many iterations; None if it has not, or has lost its summary."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
        return summary if summary["iterations"] == iterations else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class Bar:
    """A progress bar in a terminal; one line per iteration elsewhere."""

    def __init__(
        self, console: Console, total: int, done: int, words: tuple[str, str] = ("training", "iteration")
    ) -> None:
        """words: what goes on, and what is counted."""
        self.console, self.total, self.unit = console, total, words[1]
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        ]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(words[0], total=total, completed=done, numbers="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, iteration: int, numbers: str) -> None:
        """Advance to an iteration. numbers: its metrics in a few words."""
        self.progress.update(self.task, completed=iteration, numbers=numbers)
        if not self.console.is_terminal:
            self.console.print(f"{self.unit} {iteration}/{self.total}  {numbers}")


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, Python and package versions of a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def processor() -> str:
    """The CPU's model name, or its architecture where the system does not report one."""
    table = Path("/proc/cpuinfo")  # Linux
    models = re.findall(r"model name\s*: (.+)", table.read_text(encoding="utf-8")) if table.exists() else []
    return models[0] if models else platform.processor() or platform.machine()
