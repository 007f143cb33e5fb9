"""The phases of an iteration by name, which cost nothing until somebody measures them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Observer(Protocol):
    """Is told when phases begin and end. One may lie inside another, as waiting for other ranks does."""

    def begin(self, name: str) -> None:
        """A phase begins."""
        ...

    def end(self, name: str) -> None:
        """It ends, also by an error."""
        ...


_observers: list[Observer] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a phase, such as `decode` or `update`."""
    for observer in _observers:
        observer.begin(name)
    try:
        yield
    finally:
        for observer in reversed(_observers):
            observer.end(name)


def is_observed() -> bool:
    """Whether somebody measures phases."""
    return bool(_observers)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell an observer of all phases in this block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
