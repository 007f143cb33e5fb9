"""Rollouts written whole: what the learner saw of every token, one file an iteration in RUN/rollouts.

A row is a response, or on control the steps of one environment. Its keys are those of the rollout (`TextRollout.rows`
says which), `iteration`, and `row`, its number in the rollout. Numbers are exact: float32 is a part of the float64 that
JSON's digits are read as, and Parquet holds float32 itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from textenv.training.files import replacing

FOLDER = "rollouts"
JSONL, PARQUET = ".jsonl", ".parquet"
FIELDS = "fields"  # a prompt's own fields may be of any kind, so that in Parquet they are JSON


class Dumps:
    """Writes every Nth rollout of a run."""

    def __init__(self, folder: Path, every: int, file_format: str, resume_at: int) -> None:
        """every: iterations; 0: never. resume_at: the last iteration to keep; later files are removed."""
        self.folder, self.every, self.suffix = folder / FOLDER, every, f".{file_format}"
        for number, path in _files(self.folder):
            if number > resume_at:
                path.unlink()

    def due(self, iteration: int) -> bool:
        """Whether the rollout of this iteration is written."""
        return self.every > 0 and iteration % self.every == 0

    def write(self, iteration: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a rollout. What is neither a number nor a text, in a prompt's fields, is written as a text."""
        self.folder.mkdir(exist_ok=True)
        numbered = [{"iteration": iteration, "row": number} | dict(row) for number, row in enumerate(rows)]
        write = _write_parquet if self.suffix == PARQUET else _write_json_lines
        write(self.folder / f"{iteration:05d}{self.suffix}", numbered)


def read_rollouts(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of all rollouts that a run has dumped, in order, from either format; one file at a time in memory.

    folder: of the run. Raises ValueError if there are none.
    """
    files = _files(Path(folder) / FOLDER)
    if not files:
        raise ValueError(f"no rollouts in {str(folder)!r}; give a run folder of train --dump-rollouts 10 or so.")
    return (row for _, path in files for row in _read(path))


def check_installed(file_format: str) -> None:
    """Raise ValueError if the package that writes a format is missing."""
    if f".{file_format}" == PARQUET and find_spec("pyarrow") is None:
        raise ValueError(
            "--dump-format parquet needs PyArrow, which is not installed: pip install 'textenv[parquet]', or take "
            "--dump-format jsonl."
        )


def _files(folder: Path) -> list[tuple[int, Path]]:
    """The files of a folder with their iterations, in order."""
    paths = folder.glob("*") if folder.is_dir() else ()
    return sorted((int(path.stem), path) for path in paths if path.suffix in (JSONL, PARQUET) and path.stem.isdecimal())


def _write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, default=str).encode() + b"\n")


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(
        [row | {FIELDS: json.dumps(row[FIELDS], default=str)} if FIELDS in row else row for row in rows]
    )
    table = table.cast(pyarrow.schema([(field.name, _narrow(field.type)) for field in table.schema]))
    with replacing(path) as file:
        parquet.write_table(table, file)


def _narrow(kind: Any) -> Any:
    """The type of a column, with float32 in lists, whose numbers all come from tensors of it."""
    import pyarrow

    if not pyarrow.types.is_list(kind):
        return kind
    inner = kind.value_type
    return pyarrow.list_(pyarrow.float32() if pyarrow.types.is_float64(inner) else _narrow(inner))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == JSONL:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
        return
    check_installed("parquet")
    from pyarrow import parquet

    for row in parquet.read_table(path).to_pylist():
        yield row | {FIELDS: json.loads(row[FIELDS])} if FIELDS in row else row
