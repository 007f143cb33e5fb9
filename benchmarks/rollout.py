"""Tokens a second, side by side in one run: single environments, the vector environment, the fast path.

`python -m benchmarks.rollout`. Every way plays the same number of rows of the embedded task. The first two are
driven by tokens that were sampled beforehand, so that they pay for the environment alone; the fast path
samples from the policy and judges the responses, which is all of a learner's rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

import textenv  # registers TextGen-v0
from benchmarks import rows
from textenv.env import TextGenEnv
from textenv.generation import generate, judge
from textenv.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    rows: int = 64  # episodes side by side
    repeats: int = 5  # of each way, interleaved; the median counts
    seed: int = 0  # of prompts and tokens


def play(env: VectorEnv, tokens: torch.Tensor, seed: int) -> int:
    """Steps through the given responses [B, R]; returns the number of tokens written."""
    env.reset(seed=seed)
    for column in tokens.T.numpy():
        env.step(column)
    return tokens.numel()


def main(settings: Settings) -> None:
    """Measures the three ways and prints tokens a second and ratios."""
    vector = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0")] * settings.rows, autoreset_mode=AutoresetMode.NEXT_STEP)
    env = gym.make("TextGen-v0").unwrapped
    assert isinstance(env, TextGenEnv) and env.task.reference is not None
    task, model = env.task, env.task.reference.model
    prompts = task.prompts.select(range(settings.rows))
    generator = torch.Generator(task.device).manual_seed(settings.seed)
    # Sixteen tokens that end nothing, so that every row steps all the time.
    tokens = torch.randint(10, 200, (settings.rows, 16), generator=torch.Generator().manual_seed(settings.seed))

    def fast() -> int:
        state = generate(task, model, prompts, Sampling(), generator).state
        judge(task, state, prompts.texts)
        return int(state.length.sum())

    ways: dict[str, Callable[[], int]] = {
        "sync": lambda: play(sync, tokens, settings.seed),
        "vector": lambda: play(vector, tokens, settings.seed),
        "fast path": fast,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            count = way()
            speeds[name].append(count / (time.perf_counter() - started))
    base = median(speeds["sync"])
    results = [
        {"way": name, "tokens_per_second": median(found), "ratio_to_sync": median(found) / base, "all": found}
        for name, found in speeds.items()
    ]
    path = rows.write("rollout", results, vars(settings) | {"textenv": textenv.__version__})
    for row in results:
        print(f"{row['way']:10} {row['tokens_per_second']:8.0f} tokens/s  {row['ratio_to_sync']:6.1f} x sync")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
