"""Output of a run: scalars, a progress bar, and a description of the machine."""

from __future__ import annotations

import json
import platform
import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from agents.reporting.files import write_text

PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium", "transformers")


class Scalars:
    """Metrics of every iteration, written to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        """resume_at: the last iteration to keep; later rows were written after the last checkpoint."""
        self.folder, self.path, self.resume_at = folder, folder / "metrics.jsonl", resume_at
        read = {row["iteration"]: row for row in self._read()}  # the last row of an iteration counts
        self.rows = [read[number] for number in sorted(read) if 0 < number <= resume_at]
        self.lost = resume_at - len(self.rows)  # iterations whose metrics could not be read any more
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @cached_property
    def writer(self) -> SummaryWriter:
        """TensorBoard's writer. It creates its file, so that it waits for the first metrics."""
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.resume_at + 1)

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append the metrics of an iteration."""
        row = {"iteration": iteration} | metrics
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush everything to disk."""
        if "writer" in vars(self):
            self.writer.close()

    def _read(self) -> list[dict[str, Any]]:
        """All rows that can be read. A killed run or a full disk may leave a part of a row, a power cut any bytes."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        rows = [_parsed(line) for line in lines]
        return [row for row in rows if isinstance(row, dict) and type(row.get("iteration")) is int]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


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
    models = re.findall(r"model name\s*: (.+)", table.read_text(encoding="utf-8")) if table.exists() else []
    return models[0] if models else platform.processor() or platform.machine()
