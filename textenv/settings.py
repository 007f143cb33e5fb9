"""Checks the values of settings: by the types that their dataclass declares, and names of what is to be written."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    Path: "a path",
    Sequence: "a list",
    Mapping: "a mapping",
    type(None): "None",
}


def plain(value: Any) -> Any:
    """A value with NumPy scalars as Python's and paths as texts, also inside lists, tuples and mappings."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {plain(name): plain(item) for name, item in value.items()}
    return value


def check_types(config: Any, but: Collection[str] = ()) -> None:
    """Convert the fields of a dataclass to plain values of their declared types, also of a frozen one, in place.

    but: fields to leave alone. Raises ValueError for a value of another type, and for a number that is not finite.
    """
    for field in fields(config):
        if field.name in but:
            continue
        declared, value = _types(type(config))[field.name], plain(getattr(config, field.name))
        try:
            object.__setattr__(config, field.name, _convert(value, declared))
        except (TypeError, OverflowError):
            raise ValueError(f"{field.name} must be {_describe(declared)}, got {value!r}.") from None


@cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert(value: Any, declared: Any) -> Any:
    """The value as the declared type. Raises TypeError or OverflowError if it is of another."""
    origin, members = typing.get_origin(declared), typing.get_args(declared)
    if origin in (Union, types.UnionType):
        return _convert_to_one(value, members)
    if origin is Literal and value in members:
        return value
    if declared is Any or (isinstance(origin, type) and origin is not tuple and isinstance(value, origin)):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, members[0]) for item in value)
    if declared is Path and isinstance(value, str):
        return Path(value)
    if declared is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if declared in (bool, int) and type(value) is declared:
        return value
    if isinstance(declared, type) and declared not in (bool, int, float) and isinstance(value, declared):
        return value
    raise TypeError


def _convert_to_one(value: Any, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return _convert(value, member)
        except TypeError:
            continue
    raise TypeError


def _describe(declared: Any) -> str:
    origin, members = typing.get_origin(declared), typing.get_args(declared)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, members))
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin is tuple:
        return f"a list, each item {_describe(members[0])}"
    return NAMES.get(origin or declared, f"a {getattr(declared, '__name__', declared)}")


def check_name(path: Path, setting: str) -> None:
    """Raise ValueError for a name that no file can have here, such as one that is too long. Creates nothing.

    setting: the name of the setting, for the message.
    """
    parent = _nearest(path)
    for place in (path, *(parent / part for part in path.absolute().relative_to(parent).parts)):  # each may be too long
        try:
            place.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be written: {error.strerror}; choose another {setting}.") from error


def check_new_folder(folder: Path, setting: str) -> None:
    """Raise ValueError for a folder that is not empty or cannot be written. Creates nothing.

    setting: the name of the setting, for the message.
    """
    parent = _nearest(folder)
    if not os.path.isdir(parent) or not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        why = "is not writable" if os.path.isdir(parent) else "is not a folder"
        raise ValueError(f"{str(folder)!r} cannot be written: {str(parent)!r} {why}; choose another {setting}.")
    check_name(folder, setting)
    if os.path.isdir(folder) and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} exists already and is not empty; choose another {setting}.")


def _nearest(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))  # false for a name that is too long
