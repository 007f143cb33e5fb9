"""Classic control by the learners here and by Stable-Baselines3: same environments, settings and number of steps.

`python -m benchmarks.classic_control`, or some: `--envs CartPole-v1 --algorithms ppo --seeds 0 1`. Both sides take
the settings of `agents/presets.py`. Every run is a process of one thread, measured by 20 episodes without chance.
LunarLander-v3 needs `pip install "textenv[box2d]"`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot

from agents.presets import PRESETS
from benchmarks import rows
from benchmarks.statistics import interquartile_mean, interval

ENVIRONMENTS = tuple(env for env in PRESETS if env != "TextGen-v0")
LEARNERS = ("ours", "sb3")
KEYS = ("env", "algorithm", "learner", "seed")  # of a run
# Mean return, its deviation, frames: what others published of PPO.
PUBLISHED = {
    "CartPole-v1": (("CleanRL", 490.04, 6.12, "500k"), ("RL Zoo, tuned", 500.0, 0.0, "100k")),
    "Acrobot-v1": (("CleanRL", -86.36, 1.32, "500k"), ("RL Zoo, tuned", -73.506, 18.201, "1M")),
    "MountainCar-v0": (("CleanRL", -200.0, 0.0, "500k"), ("RL Zoo, tuned", -110.423, 19.473, "1M")),
    "Pendulum-v1": (("CleanRL RPO", -151.08, 3.73, "8M"), ("RL Zoo, tuned, gSDE", -172.225, 104.159, "100k")),
    "LunarLander-v3": (("RL Zoo, tuned, v2", 242.119, 31.823, "1M"),),
}
SOURCES = "CleanRL: docs/benchmark/ppo.md and rpo.md, 3 and 10 seeds. RL Zoo: benchmark.md, one run, ± over episodes."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run."""

    envs: tuple[str, ...] = ENVIRONMENTS
    algorithms: tuple[str, ...] = ("ppo",)
    learners: tuple[str, ...] = LEARNERS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 2  # processes side by side; speed is measured by benchmarks.control_speed, not here


def jobs(settings: Settings) -> Iterator[dict[str, Any]]:
    """Every run there is to do, where the algorithm has a preset for the environment."""
    for env in settings.envs:
        for algorithm in settings.algorithms:
            if algorithm in PRESETS[env]:
                for seed in settings.seeds:
                    for learner in settings.learners:
                        yield {"env": env, "algorithm": algorithm, "learner": learner, "seed": seed}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.control_run", json.dumps(job)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=rows.HERE.parent)
    if result.returncode:
        raise SystemExit(f"{job} failed:\n{result.stderr[-2000:]}")
    row = job | json.loads(result.stdout.splitlines()[-1])
    print(f"{job}  return {row['return']:.1f}  {time.perf_counter() - started:.0f} s", flush=True)
    return row


def groups() -> dict[tuple[str, str, str], list[float]]:
    """Returns of all seeds, by environment, algorithm and learner."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows.measured("classic_control"):
        found.setdefault((row["env"], row["algorithm"], row["learner"]), []).append(row["return"])
    return found


def table() -> str:
    """Interquartile means with 95% intervals, in Markdown."""
    lines = ["| environment | algorithm | learner | IQM of returns | 95% interval | worst seed | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (env, algorithm, learner), returns in groups().items():
        low, high = interval([returns])
        lines.append(
            f"| {env} | {algorithm} | {learner} | {interquartile_mean(returns):.1f} | {low:.1f} to {high:.1f} | "
            f"{min(returns):.1f} | {len(returns)} |"
        )
    return "\n".join(lines)


def draw() -> None:
    """A panel an environment: every seed, the interquartile mean with its interval, and what others published."""
    found = groups()
    shown = [env for env in ENVIRONMENTS if any(env == key[0] for key in found)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.4 * len(shown), 4.6), squeeze=False, layout="constrained")
    for axis, env in zip(axes[0], shown, strict=True):
        keys = [key for key in found if key[0] == env]
        for place, key in enumerate(keys):
            returns, color = found[key], "#1f6fb4" if key[2] == "ours" else "#e08a1e"
            low, high = interval([returns])
            axis.plot([place] * 2, [low, high], color=color, linewidth=6, alpha=0.35, solid_capstyle="butt")
            axis.plot(place, interquartile_mean(returns), "_", color=color, markersize=22, markeredgewidth=2.5)
            axis.plot([place] * len(returns), returns, ".", color="black", markersize=5, alpha=0.6)
        for index, (name, mean, _, frames) in enumerate(PUBLISHED[env]):
            axis.axhline(mean, color="#888888", linewidth=0.8, linestyle=(":", "--")[index], label=f"{name}, {frames}")
        axis.set_xticks(range(len(keys)), [f"{key[1]}\n{key[2]}" for key in keys], fontsize=8)
        axis.set_xlim(-0.6, len(keys) - 0.4)
        axis.set_title(env, fontsize=10)
        axis.legend(fontsize=6.5, frameon=False)
        axis.grid(axis="y", alpha=0.25)
    axes[0][0].set_ylabel("return of 20 episodes without chance")
    figure.suptitle(
        "dots: seeds; bars: interquartile mean with 95% interval; lines: published PPO (Pendulum's upper: RPO)",
        fontsize=9,
    )
    figure.savefig(rows.RESULTS / "classic_control.png", dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Runs all, adds them to what was measured before, prints a table and draws a picture."""
    with ThreadPoolExecutor(settings.workers) as pool:
        for row in pool.map(run, jobs(settings)):
            rows.add("classic_control", row, KEYS, {"published": PUBLISHED, "sources": SOURCES})
    draw()
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
