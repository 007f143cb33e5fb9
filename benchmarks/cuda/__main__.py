"""Correctness on a GPU, then speed, then a real chat model, in one command.

    python -m benchmarks.cuda --output FOLDER --model CHAT_MODEL

About eight minutes on one GPU: no section starts after 460 seconds. Without a GPU, sizes are small. A section writes
its rows as soon as it has them, and one that fails ends in a row with the error. The table of all rows comes last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from agents.reporting.report import machine
from benchmarks import rows as result_rows
from benchmarks.cuda import right, speed, sums
from benchmarks.cuda.scale import Row, Scale, free, scale_of

SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "conformance": right.conformance,
    "captured": right.captured,
    "first_update": right.first_update,
    "algorithms": right.algorithms,
    "main_job": right.main_job,
    "resume": right.resume,
    "one_rank": right.one_rank,
    "host_syncs": right.host_syncs,
    "decode": speed.decode,
    "update": speed.update,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sections, time limit and output folder."""

    output: Path  # folder for cuda.json
    sections: tuple[str, ...] = (*SECTIONS, "sums")  # sections to run, in order
    model: Path | None = None  # folder of a chat model for `sums`, which is skipped without it
    seconds: float = 460.0  # no section starts after this


def main(settings: Settings) -> None:
    """Run the sections and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = dict(SECTIONS)
    if settings.model is not None:
        sections["sums"] = partial(sums.sums, folder=settings.model)
    if unknown := set(settings.sections) - {*SECTIONS, "sums"}:
        raise SystemExit(f"no section {sorted(unknown)}; known are {[*SECTIONS, 'sums']}.")
    settings.output.mkdir(parents=True, exist_ok=True)
    scale, rows, started = scale_of(device), list[Row](), time.perf_counter()
    for name in settings.sections:
        if name not in sections or time.perf_counter() - started > settings.seconds:
            rows.append({"section": name, "case": "skipped"})
            continue
        for row in _guarded(sections[name], scale):
            rows.append({"section": name, **row, "at": round(time.perf_counter() - started, 1)})
            print(describe(rows[-1]), flush=True)
            _write(settings, scale, rows)
        free(device)
    _write(settings, scale, rows)
    print("\n".join(["", *map(describe, rows)]))


def _guarded(section: Callable[[Scale], Iterator[Row]], scale: Scale) -> Iterator[Row]:
    """The rows of a section; an error becomes its last row."""
    try:
        yield from section(scale)
    except Exception as error:  # the later sections still run
        yield {"case": "stopped", "error": f"{type(error).__name__}: {error}"[:1000]}


def describe(row: Row) -> str:
    """A row as one line of text."""
    numbers = [
        f"{key} {_short(value)}" for key, value in row.items() if key not in ("section", "case", "samples", "at")
    ]
    return f"{row['section']:12} {row['case']:44} {'  '.join(numbers)}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(settings: Settings, scale: Scale, rows: list[Row]) -> None:
    document = {
        "commit": result_rows.COMMIT,
        "machine": machine(scale.device),
        "settings": {key: str(value) for key, value in (asdict(settings) | vars(scale)).items()},
        "rows": rows,
    }
    (settings.output / "cuda.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
