"""Call user functions concurrently and with a time limit, so that a call that hangs does not hang the program.

Every batch starts its own daemon threads. A thread that never returns is abandoned; it delays neither the next call
nor the end of the process. Nothing here is specific to rewards.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

# Folders of code that is on the stack between the caller and the user's function.
INTERNAL = (Path(__file__).parents[1], Path(asyncio.__file__).parent)
# Index of the call; then "started" with the time, "returned" with the value, or "raised" with the exception.
Event = tuple[int, str, Any]


class CallFailed(Exception):
    """Call `index` raised `error`."""

    def __init__(self, index: int, error: BaseException) -> None:
        super().__init__(index, error)
        self.index, self.error = index, error


class CallOverdue(Exception):
    """Call `index` exceeded the time limit."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def call_each(
    function: Callable[[int], Any], count: int, *, workers: int = 1, timeout: float | None = None
) -> list[Any]:
    """`[function(0), ..., function(count - 1)]`, at most `workers` at a time, each within `timeout` seconds.

    A returned coroutine is run to completion. One worker without a time limit runs in the caller's thread. Raises
    CallFailed or CallOverdue for the first call that fails; calls that have not started by then are not made.
    """
    if workers == 1 and timeout is None:
        return [_call_here(function, index) for index in range(count)]
    waiting, events, abandoned = SimpleQueue[int](), SimpleQueue[Event](), threading.Event()
    for index in range(count):
        waiting.put(index)
    # CUDA's present device belongs to a thread: new ones would use the first, whichever is this process's own.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    for _ in range(min(workers, count)):
        work = partial(_work, function, waiting, events, abandoned)
        threading.Thread(target=_on_device, args=(device, work), daemon=True).start()
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
    # On a new thread, since the caller's thread may already run an event loop (a notebook does).
    try:
        return call_each(lambda _: value, 1, timeout=threading.TIMEOUT_MAX)[0]
    except CallFailed as failed:
        raise CallFailed(index, failed.error) from failed.error


def _on_device(device: int | None, work: Callable[[], None]) -> None:
    if device is not None:
        torch.cuda.set_device(device)
    work()


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
        except BaseException as error:  # even SystemExit, since the caller waits for an event from this thread
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
            raise CallOverdue(min(started, key=lambda index: started[index])) from None
        if kind == "started":
            started[index] = value
            continue
        del started[index]
        if kind == "raised":
            raise CallFailed(index, value) from value
        returned[index] = value
    return [returned[index] for index in range(count)]


def describe(error: BaseException) -> str:
    """An exception on one line: its type, its message and the line of the user's function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if not any(path in Path(frame.filename).parents for path in INTERNAL)]
    source = (user_frames or frames[-1:])[:1]
    place = f" ({source[0].filename}, line {source[0].lineno})" if source else ""
    return f"{type(error).__name__}: {error}{place}"
