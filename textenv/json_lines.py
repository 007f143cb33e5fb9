"""Reads JSONL files: UTF-8, one JSON value on each line. Every error names the file and the line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DEEPEST = 100  # levels of nested lists and objects; Python gives up at about a thousand


def read_json_lines(path: Path, example: str) -> list[tuple[str, Any]]:
    """The place ("PATH, line N") and the value of each line that is not blank. A byte-order mark is skipped.

    example: a good line, for messages. Raises ValueError for a file that cannot be read, for what is not UTF-8 or not
    JSON, for numbers that are not finite or beyond float64, and for deep nesting.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); give a .jsonl file.") from error
    values = []
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        text = _decode(line, place, first=number == 1)
        if text.strip():
            values.append((place, _parse(text, place, example)))
    return values


def _decode(line: bytes, place: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 ({error.reason}, byte {line[error.start]:#x}); save the file as UTF-8."
        ) from error


def _parse(text: str, place: str, example: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character, as in "\ud83d", cannot be encoded
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"nested deeper than {DEEPEST} levels"
        raise ValueError(f"{place}: not JSON ({reason}). Write one object per line, such as {example}.") from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise ValueError(f"{place}: nested deeper than {DEEPEST} levels. Write a flat object, such as {example}.")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite, or too large")
    return value


def _integer(digits: str) -> int:
    _finite(digits)  # beyond float64, an integer cannot become a weight or a score
    return int(digits)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        item
        for each in level
        if isinstance(each, dict | list)
        for item in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth
