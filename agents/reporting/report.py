"""Output of a run: scalars, a progress bar, and a description of the machine."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium", "transformers")


class Scalars:
    """Metrics of every iteration, written to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.rows = [row for row in self._read() if row["iteration"] <= resume_at]
        rewritten = self.path.with_suffix(".new")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        rewritten.replace(self.path)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append the metrics of an iteration."""
        row = {"iteration": iteration} | metrics
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush everything to disk."""
        self.writer.close()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        # A killed run may leave a partial last line; it is later than any checkpoint.
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]


class Bar:
    """A progress bar in a terminal; one line per iteration elsewhere."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total = console, total
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        ]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("training", total=total, completed=done, numbers="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, iteration: int, numbers: str) -> None:
        """Advance to an iteration. numbers: its metrics in a few words."""
        self.progress.update(self.task, completed=iteration, numbers=numbers)
        if not self.console.is_terminal:
            self.console.print(f"iteration {iteration}/{self.total}  {numbers}")


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
    models = re.findall(r"model name\s*: (.+)", table.read_text()) if table.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")
