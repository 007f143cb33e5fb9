"""Cost of generation, scoring and updates against rows, prompt width, response width and parameters.

`python -m benchmarks.scaling`. One size changes at a time; random weights, texts without padding, responses that fill
their budget, one thread, seconds of the CPU. An update is PPO's: the critic's values, advantages, and one epoch of one
optimizer step. All sizes of a sweep are measured in turns. Reported are the slope of log seconds against log size over
the whole sweep, and where the slope changes: a slope of 1 is a cost in proportion, of 0 a cost that is all overhead.
When the response width changes, rows change against it, so that the number of tokens stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks import rows as result_rows
from benchmarks.support import models, ours
from benchmarks.support.measure import bend, interleaved, one_thread, ratios, show, slope, table
from benchmarks.support.pictures import logarithmic, short
from textenv.state import TextState

PARTS = ("generation", "scoring", "update")
SWEEPS = ("rows", "prompt", "response", "parameters")
TITLES = {
    "rows": "rows",
    "prompt": "prompt width",
    "response": "response width, equal tokens",
    "parameters": "parameters",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the sweeps, and of what does not change."""

    sweeps: tuple[Literal["rows", "prompt", "response", "parameters"], ...] = SWEEPS  # sweeps to run
    rows: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)  # responses
    prompt: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # tokens
    response: tuple[int, ...] = (32, 64, 128, 256)  # tokens
    tokens: int = 4096  # of all responses together, while the response width changes
    parameters: tuple[str, ...] = ("GPT-2, 0.2M", "GPT-2, 1M", "GPT-2, 10M", "Llama, 25M", "Llama, 135M")  # shapes
    model: str = "GPT-2, 1M"  # shape, while another size changes
    base: tuple[int, int, int] = (32, 16, 32)  # rows, P and R, while another size changes
    large_base: tuple[int, int, int] = (8, 16, 32)  # the same while parameters change
    repeats: int = 5  # turns
    seed: int = 0  # of the tokens
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {
    "rows": (1, 2, 4, 8),
    "prompt": (8, 16, 24, 32),
    "response": (4, 8, 16, 32),
    "tokens": 32,
    "parameters": ("GPT-2, 0.2M", "GPT-2, 1M"),
    "base": (2, 8, 4),
    "large_base": (2, 8, 4),
    "repeats": 1,
}
Point = tuple[float, str, tuple[int, int, int]]  # size, shape, (rows, P, R)


def points_of(sweep: str, settings: Settings) -> list[Point]:
    """The points of a sweep."""
    rows, prompt, response = settings.base
    if sweep == "rows":
        return [(size, settings.model, (size, prompt, response)) for size in settings.rows]
    if sweep == "prompt":
        return [(size, settings.model, (rows, size, response)) for size in settings.prompt]
    if sweep == "response":
        return [(size, settings.model, (settings.tokens // size, prompt, size)) for size in settings.response]
    shapes = [(models.parameters_of(models.random_model(name)), name) for name in settings.parameters]
    return [(size, name, settings.large_base) for size, name in sorted(shapes)]


def methods_of(point: Point, settings: Settings) -> dict[str, Callable[[], float]]:
    """The three parts of the work at a point. They return 1, but `update` its seconds: it is a part of an iteration."""
    _, name, (rows, prompt, response) = point
    language = models.language_model(name)
    task = models.task_of(language, rows, prompt, response)
    generator, latest = torch.Generator().manual_seed(settings.seed), dict[str, TextState]()
    job = {"rollout_size": rows, "minibatch_size": rows, "epochs": 1, "iterations": settings.repeats + 1}
    # One prompt more, to be held out: training wants one.
    trained = models.task_of(language, rows + 1, prompt, response, reward=task.reward)
    collected: list[float] = []
    trainer = ours.trainer_on(trained, job | {"schedule": "constant"}, lambda: collected.append(time.process_time()))
    iterations = trainer.iterate()

    def generation() -> float:
        latest["state"] = ours.write(task, language.model, task.prompts, generator).state
        return 1.0

    def scoring() -> float:
        ours.score(task, latest["state"], task.prompts)
        return 1.0

    def update() -> float:
        next(iterations)
        return time.process_time() - collected[-1]

    return dict(zip(PARTS, (generation, scoring, update), strict=True))


def measure(sweep: str, settings: Settings) -> dict[str, Any]:
    """Seconds of every part at every point of a sweep, with slopes."""
    points = points_of(sweep, settings)
    methods = {
        f"{index} {part}": method
        for index, point in enumerate(points)
        for part, method in methods_of(point, settings).items()
    }
    times = interleaved(methods, settings.repeats)
    sizes = [size for size, *_ in points]
    row: dict[str, Any] = {"sweep": sweep, "sizes": sizes, "points": [point[1:] for point in points]}
    every: dict[str, list[list[float]]] = {}
    for part in PARTS:
        measured = [times[f"{index} {part}"] for index in range(len(points))]
        every[part] = [each.work if part == "update" else each.seconds for each in measured]  # [points][turns]
    every["all"] = [[sum(turn) for turn in zip(*parts, strict=True)] for parts in zip(*every.values(), strict=True)]
    for part, seconds in every.items():
        medians = [median(turns) for turns in seconds]
        row[part] = {"seconds": medians, "slope": slope(sizes, medians), "growth": ratios(seconds[-1], seconds[0])}
        row[part] |= {"bend": bend(sizes, medians)} if len(sizes) > 3 else {}
        row[part]["turns"] = seconds
    return row


def lines_of(results: Sequence[dict[str, Any]]) -> str:
    """The table of slopes."""
    header = ["size", "from, to", "part", "slope", "bends at (slope below, above)", "last / first"]
    lines = []
    for row in results:
        for part in (*PARTS, "all"):
            numbers = row[part]
            turn = numbers.get("bend")
            bent = f"{short(turn['at'])} ({turn['below']:.2f}, {turn['above']:.2f})" if turn else ""
            ends = f"{short(row['sizes'][0])}, {short(row['sizes'][-1])}"
            lines.append([TITLES[row["sweep"]], ends, part, f"{numbers['slope']:.2f}", bent, show(numbers["growth"])])
    return table(header, lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds against size, a panel for each sweep."""
    figure = Figure(figsize=(4 * len(results), 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        for part in PARTS:
            numbers = row[part]
            label = f"{part} ({numbers['slope']:.2f})"
            (line,) = axes.plot(row["sizes"], numbers["seconds"], marker=".", label=label)
            if "bend" in numbers:
                at = row["sizes"].index(numbers["bend"]["at"])
                axes.plot(row["sizes"][at], numbers["seconds"][at], "o", color=line.get_color(), fillstyle="none")
        axes.set(xlabel=TITLES[row["sweep"]], ylabel="CPU seconds, one thread")
        logarithmic(axes, row["sizes"])
        axes.legend(fontsize=8, title="slope", title_fontsize=8)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    """Measure every sweep and print the table."""
    one_thread()
    settings = replace(settings, **QUICK) if settings.quick else settings
    result_rows.report("scaling", (measure(sweep, settings) for sweep in settings.sweeps), settings, lines_of, draw)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
