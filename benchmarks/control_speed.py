"""Frames per second of PPO on CartPole-v1, learning included: our learner and Stable-Baselines3, alternating.

`python -m benchmarks.control_speed`. One thread. Both have the same number of environments, networks (two layers of
64), rollouts, minibatches and epochs. Stable-Baselines3 runs on DummyVecEnv, its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import tyro

from benchmarks import control_run, rows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats."""

    num_envs: tuple[int, ...] = (8, 32)
    minibatches: tuple[int, ...] = (256, 512)  # one per entry of num_envs
    steps: int = 128  # per environment in a rollout
    epochs: int = 4
    frames: int = 100_000  # per run
    repeats: int = 9  # per learner, alternating; the median is reported


def job(learner: str, num_envs: int, minibatch: int, settings: Settings, repeat: int) -> dict[str, Any]:
    """The job of one run of either learner."""
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
    """Measure both learners at every number of environments and print a table."""
    results = []
    for num_envs, minibatch in zip(settings.num_envs, settings.minibatches, strict=True):
        speeds: dict[str, list[float]] = {"ours": [], "sb3": []}
        for repeat in range(settings.repeats):
            for learner, values in speeds.items():
                row = control_run.main(job(learner, num_envs, minibatch, settings, repeat))
                values.append(row["frames_per_second"])
        ratio = median(speeds["ours"]) / median(speeds["sb3"])
        ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["sb3"], strict=True)]
        results.append({"num_envs": num_envs, "minibatch_size": minibatch, "ratio": ratio, "ratios": ratios, **speeds})
        numbers = "  ".join(f"{learner} {median(values):,.0f}" for learner, values in speeds.items())
        print(f"{num_envs} environments: frames/s {numbers}  ratio {ratio:.2f}", flush=True)
    print(f"written to {rows.write('control_speed', results, vars(settings))}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
