"""Calls of other people's functions: several at a time, within a time limit, and no hang is ours.

Threads are daemons, made anew for every batch: one that never comes back is left behind, and holds up neither the
next call nor the end of the process. Nothing here knows what a reward is.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

BETWEEN = (Path(__file__).parents[1], Path(asyncio.__file__).parent)  # whose code runs before the user's own
Event = tuple[int, str, Any]  # number of the call, "started", "returned" or "raised", and when, what or the exception


class CallFailed(Exception):
    """Call number `index` raised `error`."""

    def __init__(self, index: int, error: BaseException) -> None:
        super().__init__(index, error)
        self.index, self.error = index, error


class CallOverdue(Exception):
    """Call number `index` took longer than it may."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def call_each(
    function: Callable[[int], Any], count: int, *, workers: int = 1, timeout: float | None = None
) -> list[Any]:
    """`[function(0), ..., function(count - 1)]`, at most `workers` at a time, each within `timeout` seconds.

    A function that returns a coroutine is run to its end. One worker without a time limit works in the caller's
    own thread. Raises CallFailed or CallOverdue for the first call that goes wrong; calls that had not begun by
    then are not made.
    """
    if workers == 1 and timeout is None:
        return [_call_here(function, index) for index in range(count)]
    waiting, events, abandoned = SimpleQueue[int](), SimpleQueue[Event](), threading.Event()
    for index in range(count):
        waiting.put(index)
    for _ in range(min(workers, count)):
        threading.Thread(target=_work, args=(function, waiting, events, abandoned), daemon=True).start()
    try:
        return _gather(events, count, timeout)
    finally:
        abandoned.set()


def _call_here(function: Callable[[int], Any], index: int) -> Any:
    try:
        value = function(index)
    except Exception as error:
        raise CallFailed(index, error) from error
    if not inspect.iscoroutine(value):
        return value
    # On a thread of its own, since the caller's may run an event loop already (a notebook does).
    try:
        return call_each(lambda _: value, 1, timeout=threading.TIMEOUT_MAX)[0]
    except CallFailed as failed:
        raise CallFailed(index, failed.error) from failed.error


def _work(
    function: Callable[[int], Any], waiting: SimpleQueue[int], events: SimpleQueue[Event], abandoned: threading.Event
) -> None:
    while not abandoned.is_set():
        try:
            index = waiting.get_nowait()
        except Empty:
            return
        events.put((index, "started", time.monotonic()))
        try:
            value = function(index)
            events.put((index, "returned", asyncio.run(value) if inspect.iscoroutine(value) else value))
        except BaseException as error:  # whatever it is (SystemExit too), somebody is waiting for this thread's word
            abandoned.set()
            events.put((index, "raised", error))


def _gather(events: SimpleQueue[Event], count: int, timeout: float | None) -> list[Any]:
    started: dict[int, float] = {}
    returned: dict[int, Any] = {}
    while len(returned) < count:
        left = None
        if timeout is not None and started:
            left = min(max(min(started.values()) + timeout - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        try:
            index, kind, value = events.get(timeout=left)
        except Empty:
            raise CallOverdue(min(started, key=lambda one: started[one])) from None
        if kind == "started":
            started[index] = value
            continue
        del started[index]
        if kind == "raised":
            raise CallFailed(index, value) from value
        returned[index] = value
    return [returned[index] for index in range(count)]


def describe(error: BaseException) -> str:
    """An exception in a line: its type, its message and the line of the user's function that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not any(one in Path(frame.filename).parents for one in BETWEEN)] or frames[
        -1:
    ]
    place = f" ({theirs[0].filename}, line {theirs[0].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"
