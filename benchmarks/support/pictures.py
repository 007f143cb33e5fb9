"""Axes of the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


def short(number: float) -> str:
    """A number in at most about four characters: 256, 0.05, 16k, 1.1M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def logarithmic(axes: Axes, sizes: Sequence[float]) -> None:
    """Logarithmic axes with plain numbers: a mark at every size, and at 1, 2 and 5 times the powers of ten above.

    Of sizes closer than a quarter, whose numbers would overlap, the first has one.
    """
    axes.set(xscale="log", yscale="log")
    marked: list[float] = []
    for size in sorted(sizes):
        if not marked or size > 1.25 * marked[-1]:
            marked.append(size)
    axes.set_xticks(marked, [short(size) for size in marked], rotation=45 if len(marked) > 4 else 0)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
