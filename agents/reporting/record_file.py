"""The records of a run: records.jsonl, one response or episode a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.reporting.files import read_json_lines, write_text

FILE = "records.jsonl"
ROLLOUT, HELD_OUT = "rollout", "held-out"  # where a record is from; held-out ones of iteration 0 are before training


class RecordFile:
    """Records by iteration, kept as training goes on."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        """resume_at: the last iteration to keep; later rows were written after the last checkpoint."""
        self.path = folder / FILE
        # Those after training are of its end, which is yet to come.
        kept = [row for row in read_records(folder) if row["iteration"] <= resume_at and not _is_last(row)]
        write_text(self.path, "".join(map(_line, kept)))
        self.begun = any(row["source"] == HELD_OUT for row in kept)

    def write(self, iteration: int, source: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of an iteration."""
        rows = [{"iteration": iteration, "source": source, "row": at} | dict(each) for at, each in enumerate(records)]
        if rows:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The held-out records before training, unless a resumed run has them."""
        if not self.begun:
            self.write(0, HELD_OUT, records)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records that can be read; none where there is no file."""
    rows = read_json_lines(folder / FILE)
    return [row for row in rows if isinstance(row.get("iteration"), int) and row.get("source") in (ROLLOUT, HELD_OUT)]


def _is_last(row: Mapping[str, Any]) -> bool:
    return row["source"] == HELD_OUT and row["iteration"] > 0


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"
