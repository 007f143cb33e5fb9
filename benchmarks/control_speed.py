"""Frames a second of PPO on CartPole-v1, learning included: the learner here and Stable-Baselines3's, in turns.

`python -m benchmarks.control_speed`. One thread; the same number of environments side by side, the same networks (two
layers of 64), rollouts, minibatches and passes. Stable-Baselines3 plays on DummyVecEnv, its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import tyro

from benchmarks import control_run, rows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    num_envs: tuple[int, ...] = (8, 32)
    minibatches: tuple[int, ...] = (256, 512)  # one for each number of environments
    steps: int = 128  # of each environment in a rollout
    epochs: int = 4
    frames: int = 100_000  # of each run
    repeats: int = 9  # of each side, in turns; the median counts


def job(learner: str, num_envs: int, minibatch: int, settings: Settings, repeat: int) -> dict[str, Any]:
    """One run of either side."""
    return {
        "env": "CartPole-v1",
        "algorithm": "ppo",
        "learner": learner,
        "seed": repeat,
        "train": {"iterations": settings.frames // (num_envs * settings.steps), "minibatch_size": minibatch},
        "settings": {"num_envs": num_envs, "steps": settings.steps},
        "algorithm_settings": {"epochs": settings.epochs},
    }


def main(settings: Settings) -> None:
    """Measures both sides at every number of environments and prints a table."""
    found = []
    for num_envs, minibatch in zip(settings.num_envs, settings.minibatches, strict=True):
        speeds: dict[str, list[float]] = {"ours": [], "sb3": []}
        for repeat in range(settings.repeats):
            for learner, values in speeds.items():
                row = control_run.main(job(learner, num_envs, minibatch, settings, repeat))
                values.append(row["frames_per_second"])
        ratio = median(speeds["ours"]) / median(speeds["sb3"])
        ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["sb3"], strict=True)]
        found.append({"num_envs": num_envs, "minibatch_size": minibatch, "ratio": ratio, "ratios": ratios, **speeds})
        numbers = "  ".join(f"{learner} {median(values):,.0f}" for learner, values in speeds.items())
        print(f"{num_envs} environments: frames a second {numbers}  ratio {ratio:.2f}", flush=True)
    print(f"written to {rows.write('control_speed', found, vars(settings))}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
