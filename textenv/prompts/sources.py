"""Sources of prompts: the forms of the argument `prompts`.

`gym.make("TextGen-v0", prompts=...)` takes, and on the command line `--env.prompts ...` for the strings:

| `prompts` | source |
|---|---|
| `"reviews"` | the prompts of the embedded task; so is `None`, where `reference` and `reward` are None too |
| a list or tuple | its entries; `textenv.shared(entries)` passes it through `gym.make` without a copy |
| `"path.jsonl"`, a `Path` | a UTF-8 file, a row, as a JSON object, per line |
| `"module:function"`, a function | the list that it returns, called without arguments |
| `datasets.Dataset` | its rows, with columns as fields; or one column of it |

An entry is one of:

- a text: `"Review of the phone:"`;
- a chat: `[{"role": "user", "content": "Hi"}, ...]`, for models with a chat template, with `chat=True`. Then a text
  becomes one message of the user, and the tokens end where the assistant is to speak;
- a row: `{"prompt": a text or a chat, "answer": "4", ...}`. All rows must have the same fields. In a row without a
  prompt, the field `messages` or `text` is the prompt: of `messages`, a whole chat, what follows the last message of
  the user is dropped, since the policy is to write it.

Further fields go to reward functions that have a parameter of that name, such as `answer`, or take `**fields`. The
field `weight` is used by `prompt_sampling="weighted"`.

Every prompt has at least one token and at most `max_prompt_tokens`. `prompt_sampling` and `group_size` decide the order
(samplers.py), and `reset(options=...)` chooses one prompt (reset_options.py).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textenv.json_lines import read_json_lines
from textenv.models.loading import load_function, unwrap
from textenv.prompts.tokenized import Prompt

FORMS = 'texts, chats (lists of {"role", "content"}) or rows {"prompt": ..., further fields}'
KINDS = "a list, a path that ends in .jsonl, 'module:function', or a datasets.Dataset with a column 'prompt'"
NAMES = ("prompt", "messages", "text")  # of a row's prompt; the first that it has
REMEDIES = {  # for other types of the library `datasets`, by type name
    "DatasetDict": "pick a split, such as prompts=table['train']",
    "IterableDataset": "make it a list, such as prompts=list(table.take(1000))",
    "IterableDatasetDict": "pick a split and make it a list, such as prompts=list(table['train'].take(1000))",
}


@dataclass(frozen=True)
class PromptRows:
    """The entries of a source of prompts, before tokenization."""

    prompts: tuple[Prompt, ...]
    fields: dict[str, tuple[Any, ...]]  # further fields by name, one value per prompt
    places: tuple[str, ...] = ()  # file and line of each prompt; empty if they are not from a file


def read_prompts(source: Any) -> PromptRows:
    """Read prompts from any source in the module's table.

    Raises ValueError for any other source, an empty one, an invalid entry, and rows with different fields.
    """
    source = unwrap(source)
    places, rows = _read(source)
    if not rows:
        raise ValueError("prompts are empty; give at least one.")
    rows = [_as_row(place, entry) for place, entry in zip(places, rows, strict=True)]
    _check_same_fields(places, rows)
    rows = [_with_prompt(place, row) for place, row in zip(places, rows, strict=True)]
    fields = {name: tuple(row[name] for row in rows) for name in rows[0] if name != "prompt"}
    return PromptRows(tuple(row["prompt"] for row in rows), fields, tuple(places) if _is_jsonl(source) else ())


def _read(source: Any) -> tuple[list[str], list[Any]]:
    """The place of each entry, for error messages, and the entries."""
    if _is_jsonl(source):
        return _read_jsonl(Path(source))
    if isinstance(source, str) and ":" in source:
        return _call(load_function(source), source)
    if isinstance(source, str | Path):
        raise ValueError(
            f"prompts must be a list of texts, a path that ends in .jsonl, or 'module:function', got {str(source)!r}."
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
    """Whether it is finite and ordered, with prompts as items; a table that iterates over column names is not."""
    if isinstance(source, str | Mapping | Set):
        return False
    if isinstance(source, Sequence):
        return True
    finite = isinstance(source, Sized)
    return finite and isinstance(source, Iterable) and all(isinstance(row, Mapping) for row in source)


def _number(source: Iterable[Any]) -> tuple[list[str], list[Any]]:
    rows = list(source)
    return [f"number {index}" for index in range(len(rows))], rows


def _as_row(place: str, entry: Any) -> dict[str, Any]:
    """The fields of an entry, with its prompt under the name that it has."""
    row = dict(entry) if isinstance(entry, Mapping) else {"prompt": entry}
    prompt = row.get(_name_of_prompt(row))
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise ValueError(f"prompts must be {FORMS}; {place} has type {type(entry).__name__}: {str(entry)[:80]!r}.")
    for name in row:
        if not isinstance(name, str):
            raise ValueError(f"the fields of a prompt must have names; {place} has the field {name!r}.")
    return row


def _name_of_prompt(row: Mapping[Any, Any]) -> str:
    return next((name for name in NAMES if name in row), NAMES[0])


def _with_prompt(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt in the field `prompt`."""
    name = _name_of_prompt(row)
    prompt = _asked(place, row[name]) if name == "messages" else row[name]
    return {"prompt": prompt} | {field: value for field, value in row.items() if field != name}


def _asked(place: str, messages: str | Sequence[Mapping[str, str]]) -> Prompt:
    """A chat up to its last message of the user."""
    if isinstance(messages, str):
        raise ValueError(f"messages must be a list of messages, got a text at {place}; name the field prompt.")
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"messages must have one of the user, for the policy to answer; {place} has none.")
    return list(messages)[: last + 1]


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages with the texts `role` and `content`, at least one."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(_is_message(message) for message in prompt)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _check_same_fields(places: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    for place, row in zip(places, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"all prompts must have the same fields: {places[0]} has {sorted(rows[0])}, {place} has "
                f"{sorted(row)}; give every row all of them (null for a missing value)."
            )


def _call(function: Callable, name: str) -> tuple[list[str], list[Any]]:
    try:
        inspect.signature(function).bind()  # checked before the call, whose TypeErrors are the function's own
    except (TypeError, ValueError) as error:  # ValueError: no signature
        raise ValueError(
            f"{name} is called without arguments to get prompts, and that fails ({error}); give every "
            "parameter a default, or call it yourself and pass the list."
        ) from error
    rows = function()
    if not _is_collection(rows):
        raise ValueError(f"{name} must return a list of prompts, got {type(rows).__name__}.")
    return _number(rows)


def _read_jsonl(path: Path) -> tuple[list[str], list[Any]]:
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        raise ValueError(f'no prompts file at {str(path)!r}; give a .jsonl file with {{"prompt": ...}} on each line.')
    lines = read_json_lines(path, '{"prompt": "2+2=", "answer": "4"}')
    for place, row in lines:
        prompt = row.get(_name_of_prompt(row)) if isinstance(row, dict) else None
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise ValueError(f'{place}: no text in the field "prompt", "messages" or "text", got {str(row)[:80]!r}.')
    return [place for place, _ in lines], [row for _, row in lines]
