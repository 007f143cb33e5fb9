"""Where prompts come from: lists, files, functions and datasets, of texts, of chats, or of rows with further fields."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textenv.models.loading import load_function, read_lines, unwrap
from textenv.prompts.tokenized import Prompt

FORMS = 'texts, chats (lists of {"role", "content"}) or rows {"prompt": ..., further fields}'
KINDS = "a list, a path that ends in .jsonl, 'module:function', or a datasets.Dataset with a column 'prompt'"
REMEDIES = {  # of what `datasets` also calls a dataset, by the name of its type
    "DatasetDict": "pick a split, such as prompts=table['train']",
    "IterableDataset": "make it a list, such as prompts=list(table.take(1000))",
    "IterableDatasetDict": "pick a split and make it a list, such as prompts=list(table['train'].take(1000))",
}


@dataclass(frozen=True)
class PromptRows:
    """What a source of prompts holds, not yet tokens."""

    prompts: tuple[Prompt, ...]
    fields: dict[str, tuple[Any, ...]]  # the further fields of the rows, by name
    places: tuple[str, ...] = ()  # the file and line of each, where they come from a file


def read_prompts(source: Any) -> PromptRows:
    """Rows from a list, a `datasets.Dataset` or a column of one, a `.jsonl` path, a function, or `"module:function"`.

    Raises ValueError for what is none of these, and for rows that do not all have the same fields.
    """
    source = unwrap(source)
    places, rows = _read(source)
    if not rows:
        raise ValueError("prompts are empty; give at least one.")
    rows = [_as_row(place, given) for place, given in zip(places, rows, strict=True)]
    _check_same_fields(places, rows)
    fields = {name: tuple(row[name] for row in rows) for name in rows[0] if name != "prompt"}
    return PromptRows(tuple(row["prompt"] for row in rows), fields, tuple(places) if _is_jsonl(source) else ())


def _read(source: Any) -> tuple[list[str], list[Any]]:
    """The rows of a source and where each is, for errors to say."""
    if _is_jsonl(source):
        return _read_jsonl(Path(source))
    if isinstance(source, str | Path):
        name = str(source)
        if ":" in name:
            return _call(load_function(name), name)
        raise ValueError(
            f"prompts must be a list of texts, a path that ends in .jsonl, or 'module:function', got {name!r}."
        )
    if callable(source):
        return _call(source, getattr(source, "__name__", repr(source)))
    if _is_collection(source):
        return _number(source)
    kind = type(source).__name__
    raise ValueError(f"prompts must be {KINDS}, got {kind}; {REMEDIES.get(kind, 'give one of these')}.")


def _is_jsonl(source: Any) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(".jsonl")


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
    try:
        inspect.signature(function).bind()  # ahead of the call, whose own TypeErrors are another matter
    except (TypeError, ValueError) as error:  # ValueError is for what has no signature
        raise ValueError(
            f"{name} is called without arguments to get prompts, and does not take that ({error}); give every "
            "parameter a default, or call it yourself and pass the list."
        ) from error
    rows = function()
    if not _is_collection(rows):
        raise ValueError(f"{name} must return a list of prompts, got {type(rows).__name__}.")
    return _number(rows)


def _read_jsonl(path: Path) -> tuple[list[str], list[Any]]:
    if not path.is_file():
        raise ValueError(f'no prompts file at {str(path)!r}; give a .jsonl with one {{"prompt": ...}} a line.')
    lines = list(read_lines(path))
    return [place for place, _ in lines], [_read_line(place, line) for place, line in lines]


def _read_line(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); write one object a line.") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f'{place}: no text in the field "prompt", got {line.strip()[:80]!r}.')
    return row
