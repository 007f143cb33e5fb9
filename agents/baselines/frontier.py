"""The picture of what a score costs: score and gold score against the KL to the reference, of runs and baselines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from matplotlib import pyplot

from agents.config import TrainConfig, id_of
from agents.domains import domain_of
from agents.reporting.plots import BLUE, GRAY, GREEN, ORANGE, RED
from agents.reporting.report import SUMMARY, read_metrics
from agents.run_folder import load_config
from agents.text.fingerprints import EVALUATION, REFERENCE, REWARD_MODEL
from textenv.config import NAMES

COLORS = (ORANGE, BLUE, RED, GREEN, "#7b5ea7", "#3aa6a6", GRAY)
FINGERPRINTS = "fingerprints"  # of models and prompts, in config.json of a run and summary.json of DPO
PANELS = (("score", "Score: what is optimized"), ("gold", "Gold score: what is true"))


@dataclass(frozen=True)
class Curve:
    """One method: points with `kl`, `score`, perhaps `gold`, and perhaps a `label`, in order of the KL or of time."""

    name: str
    points: Sequence[dict[str, Any]]


def read_run(folder: Path) -> Curve:
    """The curve of a finished run, from its metrics, between what was measured on held-out prompts before and after.

    A run without a rollout, such as DPO's, is two points. Raises ValueError for a folder without these numbers.
    """
    found = _summary(folder)
    if "kl_per_response" not in found or "score_after" not in found:
        raise ValueError(f"--run names {str(folder)!r}, whose summary has no score and no KL; give a run on text.")
    points = [_point(found, "before") | {"kl": 0.0}]
    points += [_of_iteration(row) for row in read_metrics(folder) if "kl_per_response" in row and "score" in row]
    points.append(_point(found, "after") | {"kl": found["kl_per_response"], "label": "end"})
    for name in ("kl", *(name for name, _ in PANELS)):
        if not all(type(point.get(name, 0.0)) in (int, float) for point in points):
            raise ValueError(
                f"--run names {str(folder)!r}, where {name} is not always a number in {SUMMARY}; leave this run out."
            )
    return Curve(folder.resolve().name, points)


def check_same_task(folder: Path, found: Mapping[str, str], reward: Any) -> bool:
    """Raise ValueError for a finished run of another reference or reward. Returns whether its held-out prompts differ.

    found: fingerprints of the task that the run is drawn beside. reward: see `reward_of`.
    """
    before, theirs = _task_of(folder)
    changed = {name for name in before.keys() | found.keys() if before.get(name) != found.get(name)}
    rewards = any(name.startswith(REWARD_MODEL) for name in changed) or _functions(theirs) != _functions(reward)
    if what := "reference" if REFERENCE in changed else "reward" if rewards else None:
        raise ValueError(
            f"--run names {str(folder)!r}, whose {what} is another than these samples'; give this command the run's "
            "environment (--env.reference, --env.reward, --env.prompts), or leave it out."
        )
    return EVALUATION in changed


def reward_of(env: str, arguments: Mapping[str, Any]) -> Any:
    """The `reward` of an environment and its arguments."""
    domain_of(env)  # registers it
    return {**gym.spec(id_of(env)).kwargs, **arguments}.get("reward")


def _task_of(folder: Path) -> tuple[dict[str, str], Any]:
    """Fingerprints and `reward` of a run, or of a training without a rollout."""
    file = folder / "config.json"
    run = os.path.isfile(file)
    config = load_config(folder)[0] if run else None  # imports the user's module, whose errors are not the files'
    with _readable(folder):
        stored = json.loads(file.read_bytes()) if run else _summary(folder)
        if config is None:
            config = TrainConfig(env=stored["env"], env_arg=tuple(stored["settings"]["env_arg"]))
        found = {**stored[FINGERPRINTS]}
    return found, reward_of(config.env, config.env_arguments(texts=NAMES))


def _functions(reward: Any) -> Any:
    """What no fingerprint tells of a reward: the names of functions, and the weights of a sum."""
    if isinstance(reward, Mapping):
        return sorted((_functions(name) or "", float(weight)) for name, weight in reward.items())
    return reward if isinstance(reward, str) and ":" in reward and not os.path.isdir(reward) else None


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / SUMMARY
    if not os.path.isfile(file):
        raise ValueError(f"--run names {str(folder)!r}, which has no {SUMMARY}; give the folder of a finished run.")
    with _readable(folder):
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise TypeError(f"{SUMMARY} is no object")
        return found


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn the errors of damaged files into a ValueError with the remedy."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"--run names {str(folder)!r}, whose files do not say what this version writes ({error}); leave this run "
            "out, or train it again."
        ) from error


def _point(summary: dict[str, Any], when: str) -> dict[str, Any]:
    names = [name for name, _ in PANELS if f"{name}_{when}" in summary]
    return {name: summary[f"{name}_{when}"] for name in names}


def _of_iteration(row: dict[str, Any]) -> dict[str, Any]:
    point = {"kl": row["kl_per_response"], "score": row.get("score/raw", row["score"])}
    return point | ({"gold": row["gold"]} if "gold" in row else {})


def draw_frontier(path: Path, curves: Sequence[Curve]) -> None:
    """Draw each method's score against its KL, and beside it the gold score where any has one."""
    panels = [panel for panel in PANELS if any(panel[0] in point for curve in curves for point in curve.points)]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.8), layout="constrained", squeeze=False
    )
    for axis, (metric, title) in zip(axes[0], panels, strict=True):
        for number, curve in enumerate(curves):
            points = [point for point in curve.points if metric in point]
            color, marker = COLORS[number % len(COLORS)], "os^Dv"[number % 5]  # readable without color too
            xs, ys = [point["kl"] for point in points], [point[metric] for point in points]
            style = ":" if len(points) == 2 else "-"  # between the ends of a training nothing was measured
            axis.plot(xs, ys, style, color=color, marker=marker, markersize=4, linewidth=1.2, label=curve.name)
            for point in points:
                place = (point["kl"], point[metric])
                axis.annotate(
                    point.get("label", ""), place, xytext=(4, -10), textcoords="offset points", fontsize=8, color=color
                )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("KL to the reference, nats a response (best of n: at most)")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.25)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
