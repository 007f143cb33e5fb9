"""Where prompts come from: lists, files, functions and datasets, of texts, of chats, or of rows with further fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textenv.loading import load_function, unwrap
from textenv.prompts import Prompt

FORMS = 'texts, chats (lists of {"role", "content"}) or rows {"prompt": ..., further fields}'


@dataclass(frozen=True)
class PromptRows:
    """What a source of prompts holds, not yet tokens."""

    prompts: tuple[Prompt, ...]
    columns: dict[str, tuple[Any, ...]]  # the further fields of the rows, by name


def read_prompts(source: Any) -> PromptRows:
    """Rows from a list, a `datasets.Dataset` or a column of one, a `.jsonl` path, a function, or `"module:function"`.

    Raises ValueError for what is none of these, and for rows that do not all have the same fields.
    """
    source = unwrap(source)
    if isinstance(source, str | Path):
        name = str(source)
        if name.endswith(".jsonl"):
            places, rows = _read_jsonl(Path(name))
        elif ":" in name:
            places, rows = _call(load_function(name), name)
        else:
            raise ValueError(
                f"prompts must be a list of texts, a path that ends in .jsonl, or 'module:function', got {name!r}."
            )
    elif callable(source):
        places, rows = _call(source, getattr(source, "__name__", repr(source)))
    elif _is_collection(source):
        places, rows = _number(source)
    else:
        raise ValueError(
            f"prompts must be a list of texts, a .jsonl path or 'module:function', got {type(source).__name__}."
        )
    if not rows:
        raise ValueError("prompts are empty; give at least one.")
    rows = [_as_row(place, given) for place, given in zip(places, rows, strict=True)]
    _check_same_fields(places, rows)
    columns = {name: tuple(row[name] for row in rows) for name in rows[0] if name != "prompt"}
    return PromptRows(tuple(row["prompt"] for row in rows), columns)


def _is_collection(source: Any) -> bool:
    """Whether it has an order and an end; a table that iterates over its column names is none."""
    if isinstance(source, str | Mapping | Set):
        return False
    if isinstance(source, Sequence):
        return True
    ends = isinstance(source, Sized)
    return ends and isinstance(source, Iterable) and all(isinstance(row, Mapping) for row in source)


def _number(source: Iterable[Any]) -> tuple[list[str], list[Any]]:
    rows = list(source)
    return [f"number {index}" for index in range(len(rows))], rows


def _as_row(place: str, given: Any) -> dict[str, Any]:
    row = dict(given) if isinstance(given, Mapping) else {"prompt": given}
    prompt = row.get("prompt")
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f"prompts must be {FORMS}; {place} is a {type(given).__name__}: {str(given)[:80]!r}.")
    return row


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(_is_message(message) for message in prompt)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _check_same_fields(places: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    for place, row in zip(places, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"all prompts must have the same fields: {places[0]} has {sorted(rows[0])}, {place} has "
                f"{sorted(row)}; give every row all of them (null where there is nothing to say)."
            )


def _call(function: Callable, name: str) -> tuple[list[str], list[Any]]:
    rows = function()
    if not _is_collection(rows):
        raise ValueError(f"{name} must return a list of prompts, got {type(rows).__name__}.")
    return _number(rows)


def _read_jsonl(path: Path) -> tuple[list[str], list[Any]]:
    if not path.is_file():
        raise ValueError(f'no prompts file at {str(path)!r}; give a .jsonl with one {{"prompt": ...}} a line.')
    places, rows = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                places.append(f"{path}, line {number}")
                rows.append(_read_line(places[-1], line))
    return places, rows


def _read_line(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); write one object a line.") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f'{place}: no text in the field "prompt", got {line.strip()[:80]!r}.')
    return row
