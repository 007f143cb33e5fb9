"""Tokens per second of a rollout: single environments, the vector environment, and the fast path.

`python -m benchmarks.rollout`. All three run the embedded task with the reference as the policy. The first two are
stepped as by an ordinary client: a forward pass over the observations, a token for each row, a step. The fast path
generates with a key/value cache and scores whole responses at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from transformers import PreTrainedModel

import textenv  # registers TextGen-v0
from benchmarks import rows
from textenv.env import TextGenEnv
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.state import left_aligned


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats."""

    rows: int = 64  # parallel episodes
    steps: int = 24  # environment steps per repeat
    repeats: int = 3  # per method, interleaved; the median is reported
    seed: int = 0  # of prompts and tokens


@torch.no_grad()
def run_steps(env: VectorEnv, model: PreTrainedModel, temperature: float, steps: int) -> int:
    """Run `steps` steps with a policy that reads observations; returns the number of tokens written."""
    observation, _ = env.reset(seed=0)
    ended, tokens = np.zeros(env.num_envs, dtype=bool), 0
    for _ in range(steps):
        ids, mask = (torch.from_numpy(observation[key]).long() for key in ("input_ids", "attention_mask"))
        ids, length = left_aligned(ids, mask)
        chosen = model(input_ids=ids).logits[torch.arange(len(length)), length - 1] / temperature  # [B, V]
        observation, _, terminated, _, _ = env.step(torch.distributions.Categorical(logits=chosen).sample().numpy())
        tokens += int((~ended).sum())  # a row that ended in the step before only resets
        ended = terminated
    return tokens


def main(settings: Settings) -> None:
    """Measure the three methods and print tokens per second and ratios."""
    vector = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0")] * settings.rows, autoreset_mode=AutoresetMode.NEXT_STEP)
    env = gym.make("TextGen-v0").unwrapped
    assert isinstance(env, TextGenEnv) and env.task.reference is not None
    task, model = env.task, env.task.reference.model
    prompts = task.prompts.select(range(settings.rows))
    generator = torch.Generator(task.device).manual_seed(settings.seed)
    temperature = task.config.temperature
    torch.manual_seed(settings.seed)

    def fast() -> int:
        state = generate(task, model, prompts, Sampling(temperature=temperature), generator).state
        score_responses(task, state, prompts.texts)
        return int(state.length.sum())

    methods: dict[str, Callable[[], int]] = {
        "sync": lambda: run_steps(sync, model, temperature, settings.steps),
        "vector": lambda: run_steps(vector, model, temperature, settings.steps),
        "fast path": fast,
    }
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(settings.repeats):
        for name, method in methods.items():
            started = time.perf_counter()
            count = method()
            speeds[name].append(count / (time.perf_counter() - started))
    base = median(speeds["sync"])
    results = [
        {"way": name, "tokens_per_second": median(values), "ratio_to_sync": median(values) / base, "all": values}
        for name, values in speeds.items()
    ]
    path = rows.write("rollout", results, vars(settings) | {"textenv": textenv.__version__})
    for row in results:
        print(f"{row['way']:10} {row['tokens_per_second']:8.0f} tokens/s  {row['ratio_to_sync']:6.1f} x sync")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
