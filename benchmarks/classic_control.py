"""Classic control with our learners and Stable-Baselines3: same environments, settings and number of steps.

`python -m benchmarks.classic_control`, or a part: `--envs CartPole-v1 --algorithms ppo --seeds 0 1`. Both use
the settings of `agents/presets.py`. Every run is a process with one thread, evaluated on 20 deterministic episodes.
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
KEYS = ("env", "algorithm", "learner", "seed")  # identify a run
# Published results of PPO: name, mean return, standard deviation, frames.
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
    """Selection and size of the runs."""

    envs: tuple[str, ...] = ENVIRONMENTS
    algorithms: tuple[str, ...] = ("ppo",)
    learners: tuple[str, ...] = LEARNERS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 2  # parallel processes; benchmarks.control_speed measures speed


def jobs(settings: Settings) -> Iterator[dict[str, Any]]:
    """All runs for which the algorithm has a preset for the environment."""
    for env in settings.envs:
        for algorithm in settings.algorithms:
            if algorithm in PRESETS[env]:
                for seed in settings.seeds:
                    for learner in settings.learners:
                        yield {"env": env, "algorithm": algorithm, "learner": learner, "seed": seed}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own; returns its row."""
    command = [sys.executable, "-m", "benchmarks.control_run", json.dumps(job)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=rows.HERE.parent)
    if result.returncode:
        raise SystemExit(f"{job} failed:\n{result.stderr[-2000:]}")
    row = job | json.loads(result.stdout.splitlines()[-1])
    print(f"{job}  return {row['return']:.1f}  {time.perf_counter() - started:.0f} s", flush=True)
    return row


def groups() -> dict[tuple[str, str, str], list[float]]:
    """Returns of all seeds by (environment, algorithm, learner)."""
    returns: dict[tuple[str, str, str], list[float]] = {}
    for row in rows.read_rows("classic_control"):
        returns.setdefault((row["env"], row["algorithm"], row["learner"]), []).append(row["return"])
    return returns


def table() -> str:
    """Markdown table of interquartile means with 95% intervals."""
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
    """One panel per environment: every seed, the interquartile mean with its interval, and published results."""
    all_returns = groups()
    environments = [env for env in ENVIRONMENTS if any(env == key[0] for key in all_returns)]
    figure, axes = pyplot.subplots(
        1, len(environments), figsize=(3.4 * len(environments), 4.6), squeeze=False, layout="constrained"
    )
    for axis, env in zip(axes[0], environments, strict=True):
        keys = [key for key in all_returns if key[0] == env]
        for position, key in enumerate(keys):
            returns, color = all_returns[key], "#1f6fb4" if key[2] == "ours" else "#e08a1e"
            low, high = interval([returns])
            axis.plot([position] * 2, [low, high], color=color, linewidth=6, alpha=0.35, solid_capstyle="butt")
            axis.plot(position, interquartile_mean(returns), "_", color=color, markersize=22, markeredgewidth=2.5)
            axis.plot([position] * len(returns), returns, ".", color="black", markersize=5, alpha=0.6)
        for index, (name, mean, _, frames) in enumerate(PUBLISHED[env]):
            axis.axhline(mean, color="#888888", linewidth=0.8, linestyle=(":", "--")[index], label=f"{name}, {frames}")
        axis.set_xticks(range(len(keys)), [f"{key[1]}\n{key[2]}" for key in keys], fontsize=8)
        axis.set_xlim(-0.6, len(keys) - 0.4)
        axis.set_title(env, fontsize=10)
        axis.legend(fontsize=6.5, frameon=False)
        axis.grid(axis="y", alpha=0.25)
    axes[0][0].set_ylabel("return of 20 deterministic episodes")
    figure.suptitle(
        "dots: seeds; bars: interquartile mean with 95% interval; lines: published PPO (Pendulum's upper: RPO)",
        fontsize=9,
    )
    figure.savefig(rows.RESULTS / "classic_control.png", dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Run everything, add the rows to the results file, print the table and draw the figure."""
    with ThreadPoolExecutor(settings.workers) as pool:
        for row in pool.map(run, jobs(settings)):
            rows.add("classic_control", row, KEYS, {"published": PUBLISHED, "sources": SOURCES})
    draw()
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
