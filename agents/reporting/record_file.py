"""The records of a run: records.jsonl, one response or episode a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.reporting.files import read_json_lines
from textenv.training.files import write_text

FILE = "records.jsonl"
ROLLOUT, HELD_OUT = "rollout", "held-out"  # where a record is from; held-out ones of iteration 0 are before training
SCORES = ("score", "raw_score", "gold", "kl")  # of a response
VALUE = int | float | None  # of a number of a record


class RecordFile:
    """Records by iteration, kept as training goes on."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        """resume_at: the last iteration to keep; later rows were written after the last checkpoint."""
        self.path = folder / FILE
        # Those after training are of its end, which is yet to come.
        kept = [row for row in read_records(folder) if row["iteration"] <= resume_at and not _is_last(row)]
        write_text(self.path, "".join(map(_line, kept)))

    def write(self, iteration: int, source: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of an iteration."""
        if records:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, _rows(iteration, source, records))))

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The held-out records before training, in place of those of a resumed run, of which a part may be lost."""
        others = [row for row in read_records(self.path.parent) if row["source"] != HELD_OUT or row["iteration"] > 0]
        write_text(self.path, "".join(map(_line, [*_rows(0, HELD_OUT, records), *others])))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records that can be read and have what a page shows of them; none where there is no file."""
    return [row for row in read_json_lines(folder / FILE) if _is_whole(row)]


def _rows(iteration: int, source: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"iteration": iteration, "source": source, "row": at} | dict(each) for at, each in enumerate(records)]


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a record has the fields of `agents.text.records.Record`, with their types and lengths."""
    if row.get("source") not in (ROLLOUT, HELD_OUT) or not isinstance(row.get("finish"), str):
        return False
    if not all(type(row.get(name)) is int and row[name] >= 0 for name in ("iteration", "row")):
        return False
    if not all(name in row and isinstance(row[name], VALUE) for name in SCORES):
        return False
    lists: list[Any] = [row.get(name) for name in ("ids", "tokens", "generated", "special")]
    if not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return False
    ids, tokens, *flags = lists
    fit = all(type(each) is int for each in ids) and all(isinstance(each, str) for each in tokens)
    return fit and all(each in (0, 1) for flag in flags for each in flag) and _has_numbers(row)


def _has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether a record has numbers for each token that the policy wrote."""
    numbers, written = row.get("numbers"), sum(row["generated"])
    return isinstance(numbers, dict) and all(
        isinstance(values, list) and len(values) == written and all(isinstance(each, VALUE) for each in values)
        for values in numbers.values()
    )


def _is_last(row: Mapping[str, Any]) -> bool:
    return row["source"] == HELD_OUT and row["iteration"] > 0


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"
