"""Seconds of methods in turns, ratios with their spread, peak memory, slopes, and tables.

Seconds are those of the CPU, of this process alone. With one thread they equal seconds on the clock on an idle machine,
and on a shared one they do not count the waiting. What remains of other work, such as a shared cache, slows all methods
of one turn alike. So ratios are taken within a turn, and their median is reported with the quartiles.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

import numpy as np
import psutil
import torch


@dataclass
class Times:
    """The calls of one method, one entry each."""

    seconds: list[float] = field(default_factory=list)  # of the CPU
    clock_seconds: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)  # what the calls returned, such as a number of tokens

    def call(self, method: Callable[[], float]) -> None:
        """Call the method once and add the entry."""
        clock, cpu = time.perf_counter(), time.process_time()
        self.work.append(float(method()))
        self.seconds.append(time.process_time() - cpu)
        self.clock_seconds.append(time.perf_counter() - clock)

    def costs(self, *, clock: bool = False) -> list[float]:
        """Seconds for one unit of work, by call."""
        seconds = self.clock_seconds if clock else self.seconds
        return [each / work for each, work in zip(seconds, self.work, strict=True)]

    @property
    def speed(self) -> float:
        """Units of work per second, the median over calls."""
        return 1 / median(self.costs())


def one_thread() -> None:
    """Run PyTorch's operations on one thread, as every measurement of speed here does."""
    torch.set_num_threads(1)


def interleaved(methods: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Times]:
    """Call the methods in turns, `repeats` times each, after one call each that does not count.

    A method returns its amount of work. Later methods of a turn may use what earlier ones of the turn have left.
    """
    for method in methods.values():
        method()
    times = {name: Times() for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            times[name].call(method)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios above / below, turn by turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def show(ratio: Mapping[str, float], digits: int = 2) -> str:
    """A median with its quartiles, as text."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


class PeakMemory:
    """The largest resident memory of a process while the block runs, in bytes, looked at every few milliseconds.

    It counts the whole process, weights and libraries included.
    """

    def __init__(self, pid: int | None = None, every: float = 0.004) -> None:
        """pid: a process, by default this one; every: seconds between two looks."""
        self.process, self.every = psutil.Process(pid), every
        self.before = self.peak = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.before = self.peak = self.process.memory_info().rss
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.is_set():
            try:
                self.peak = max(self.peak, self.process.memory_info().rss)
            except psutil.NoSuchProcess:
                return
            self.stop.wait(self.every)


def return_memory() -> None:
    """Return freed memory to the system, so that the next peak is that of what follows (Linux with glibc)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent of a power law: the slope of log cost against log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def bend(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Where the cost changes its exponent: the inner size that splits it best into two power laws.

    Returns the size `at` and the slopes `below` and `above` it. Needs four sizes.
    """
    x, y = np.log(sizes), np.log(costs)

    def error(first: int, last: int) -> float:
        line = np.polyfit(x[first:last], y[first:last], 1)
        return float(np.square(np.polyval(line, x[first:last]) - y[first:last]).sum())

    at = min(range(1, len(x) - 1), key=lambda index: error(0, index + 1) + error(index, len(x)))
    below, above = slope(sizes[: at + 1], costs[: at + 1]), slope(sizes[at:], costs[at:])
    return {"at": float(sizes[at]), "below": below, "above": above}


def table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    marks = ["---"] * len(header)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, marks, *lines))
