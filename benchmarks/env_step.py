"""What a step of the environment costs: time beside single environments, time outside the models, memory.

`python -m benchmarks.env_step`. Random tokens, so that nothing but the environment is measured. Five questions: how
soon it is ready; how much faster the native vector environment is than as many single ones; which share of its step
is no model forward; whether a step grows dearer as the text grows; and whether memory stays what caches and arrays
need.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import textenv
from benchmarks import rows
from textenv import reviews
from textenv.vector_env import TextGenVectorEnv


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    rows: int = 64  # episodes side by side
    steps: int = 48  # of each environment, each time
    repeats: int = 5  # of each way, interleaved; the median counts
    episodes: int = 20_000  # played for the memory's sake
    seed: int = 0  # of prompts and tokens


def random_steps(env: VectorEnv, steps: int, seed: int) -> float:
    """Seconds of `steps` steps with random tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, env.single_action_space.n, (steps, env.num_envs))  # type: ignore[attr-defined]
    env.reset(seed=seed)
    started = time.perf_counter()
    for actions in tokens:
        env.step(actions)
    return time.perf_counter() - started


def against_single(settings: Settings) -> list[dict[str, Any]]:
    """Environment steps a second: the native vector environment and SyncVectorEnv of single ones."""
    ways: dict[str, VectorEnv] = {
        "sync": SyncVectorEnv([lambda: gym.make("TextGen-v0")] * settings.rows, autoreset_mode=AutoresetMode.NEXT_STEP),
        "native": gym.make_vec("TextGen-v0", num_envs=settings.rows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(settings.repeats):
        for name, env in ways.items():
            seconds = random_steps(env, settings.steps, settings.seed + repeat)
            speeds[name].append(settings.steps * settings.rows / seconds)
    base = median(speeds["sync"])
    return [
        {"what": name, "steps_per_second": median(found), "ratio_to_sync": median(found) / base, "all": found}
        for name, found in speeds.items()
    ]


@contextmanager
def forward_seconds(*models: torch.nn.Module) -> Iterator[list[float]]:
    """Adds up the seconds spent in the forwards of these models."""
    total, begun = [0.0], [0.0]

    def before(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def after(*_: Any) -> None:
        total[0] += time.perf_counter() - begun[0]

    hooks = [model.register_forward_pre_hook(before) for model in models]
    hooks += [model.register_forward_hook(after) for model in models]
    yield total
    for hook in hooks:
        hook.remove()


def outside_models(settings: Settings) -> dict[str, Any]:
    """The share of a native step that is no model forward."""
    env: Any = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    assert isinstance(env, TextGenVectorEnv)
    task: Any = env.task
    shares = []
    for repeat in range(settings.repeats):
        with forward_seconds(task.reference.model, task.reward.model.base_model) as total:
            seconds = random_steps(env, settings.steps, settings.seed + repeat)
        shares.append(1 - total[0] / seconds)
    return {"what": "share of a native step outside the models", "share": median(shares), "all": shares}


def growing_text(settings: Settings) -> dict[str, Any]:
    """Seconds of a step at context 200 over those at context 20, with a model of the embedded size and 256 places."""
    tokenizer = AutoTokenizer.from_pretrained(reviews.SUPERVISED)
    config = GPT2Config.from_pretrained(reviews.SUPERVISED, n_positions=256)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(settings.seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        env: Any = gym.make_vec(
            "TextGen-v0",
            num_envs=settings.rows,
            reference=folder,
            reward="benchmarks.env_step:nothing",
            max_prompt_tokens=16,
            max_new_tokens=220,
        )
        tokens = np.full(settings.rows, 5)  # no stop token: all rows grow together
        ratios = []
        for repeat in range(settings.repeats):
            env.reset(seed=repeat)
            seconds = []
            for _ in range(200):
                started = time.perf_counter()
                env.step(tokens)
                seconds.append(time.perf_counter() - started)
            early, late = (median(seconds[context - 16 - 8 : context - 16 + 8]) for context in (24, 200))
            ratios.append(late / early)
    return {"what": "step at context 200 over step at context 20", "ratio": median(ratios), "all": ratios}


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(prompts)


def ready(settings: Settings) -> dict[str, Any]:
    """Seconds from `gym.make("TextGen-v0")` to the first observation, in this process's first use of it."""
    started = time.perf_counter()
    gym.make("TextGen-v0").reset(seed=settings.seed)
    return {"what": "seconds until the first observation", "seconds": time.perf_counter() - started}


def memory(settings: Settings) -> list[dict[str, Any]]:
    """Memory that 64 rows take beside what their caches and arrays need, and its growth over many episodes."""
    process = psutil.Process()
    single: Any = gym.make("TextGen-v0").unwrapped  # the models are in memory from here on
    config = single.task.reference.model.config
    random_steps(gym.make_vec("TextGen-v0", num_envs=1, max_new_tokens=2), 64, settings.seed)
    gc.collect()
    before = process.memory_info().rss
    env: Any = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    random_steps(env, 4, settings.seed)
    width = env.task.width
    cache = 2 * config.n_layer * settings.rows * width * config.n_embd * 4
    arrays = settings.rows * (width * (8 + 1) + env.task.vocabulary * 4)
    grown = process.memory_info().rss - before
    del env
    short = gym.make_vec("TextGen-v0", num_envs=settings.rows, max_new_tokens=2)
    played, sizes = 0, []
    tokens = np.full(settings.rows, 5)
    short.reset(seed=settings.seed)
    while played < settings.episodes:
        played += int(short.step(tokens)[2].sum())
        if played in (2_048, settings.episodes // 64 * 64) or played >= settings.episodes:
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
    return [
        {
            "what": f"memory of {settings.rows} rows, MiB",
            "grown": grown / 2**20,
            "caches_and_arrays": (cache + arrays) / 2**20,
        },
        {"what": "growth from 2,048 episodes on, MiB", "episodes": played, "growth": sizes[-1] - sizes[0]},
    ]


def main(settings: Settings) -> None:
    """Measures all five and prints a table."""
    results = [
        ready(settings),
        *memory(settings),
        *against_single(settings),
        outside_models(settings),
        growing_text(settings),
    ]
    path = rows.write("env_step", results, vars(settings) | {"textenv": textenv.__version__})
    for row in results:
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, int | float))
        print(f"{row['what']:46} {numbers}")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
