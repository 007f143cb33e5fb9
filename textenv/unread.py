"""Refuses settings that would do nothing.

A setting may be read only in some cases: `score_mean` where scores are normalized, a critic's learning rate where there
is a critic. Each such case is an `Unread` beside the settings. A setting of that case is refused if its value is not a
default: a user who sets it expects an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unread:
    """Settings that are not read in some case."""

    names: tuple[str, ...]
    case: Callable[[Any], bool]  # of the job that the settings belong to, once it is built
    because: str  # completes "NAME=VALUE would do nothing: ", and names the remedy


def refuse_unread(
    rules: Iterable[Unread], values: Mapping[str, Any], defaults: Sequence[Mapping[str, Any]], job: Any
) -> None:
    """Raise ValueError for a value that is not read, unless it equals one of its defaults.

    values, and each of the defaults: settings by name.
    """
    for rule in rules:
        changed = [name for name in rule.names if all(values[name] != known[name] for known in defaults)]
        if changed and rule.case(job):
            listed = " and ".join(f"{name}={values[name]!r}" for name in changed)
            raise ValueError(f"{listed} would do nothing: {rule.because}")
