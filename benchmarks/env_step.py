"""What a step of the environment costs: time beside single environments, time outside the models, memory.

`python -m benchmarks.env_step`. Random tokens, so that nothing but the environment is measured. Six questions: how
soon it is ready; how much faster the native vector environment is than as many single ones; how much of that is left
through Stable-Baselines3's interface; which share of a native step is no model forward; whether a step grows dearer as
the text grows; and whether memory stays what caches and arrays need.

Memory is given twice: what is alive, after the C library was told to hand back what it keeps (`malloc_trim`, Linux
with glibc), and as the process shows it, with the working memory of the forwards that the C library keeps for the
next ones. For 64 rows of the embedded models a forward over all prompts works in 11 MiB at its peak, and the reward
model's over 64 whole texts in 32 MiB (torch's profiler).
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
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
from textenv.reviews.weights import SUPERVISED
from textenv.vector_env import TextGenVectorEnv


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    rows: int = 64  # episodes side by side
    sb3_rows: tuple[int, ...] = (16, 64)  # the same, through Stable-Baselines3
    steps: int = 48  # of each environment, each time
    repeats: int = 5  # of each way, interleaved; the median counts
    episodes: int = 20_000  # played for the memory's sake
    seed: int = 0  # of prompts and tokens


def random_steps(env: VectorEnv, steps: int, seed: int) -> float:
    """Seconds of `steps` steps with random tokens, from a reset."""
    env.reset(seed=seed)
    return more_random_steps(env, steps, seed)


def more_random_steps(env: VectorEnv, steps: int, seed: int) -> float:
    """Seconds of `steps` steps with random tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, env.single_action_space.n, (steps, env.num_envs))  # type: ignore[attr-defined]
    started = time.perf_counter()
    for actions in tokens:
        env.step(actions)
    return time.perf_counter() - started


def speeds(ways: dict[str, Callable[[int], float]], count: int, settings: Settings) -> list[dict[str, Any]]:
    """Environment steps a second of each way, interleaved, and their ratio to the first way's.

    A way takes a seed and returns the seconds of `settings.steps` steps of `count` rows.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(settings.repeats):
        for name, way in ways.items():
            found[name].append(settings.steps * count / way(settings.seed + repeat))
    base = median(next(iter(found.values())))
    return [
        {"what": name, "steps_per_second": median(each), "ratio": median(each) / base, "all": each}
        for name, each in found.items()
    ]


def against_single(settings: Settings) -> list[dict[str, Any]]:
    """The native vector environment and SyncVectorEnv of as many single ones."""
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0")] * settings.rows, autoreset_mode=AutoresetMode.NEXT_STEP)
    native = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    ways: dict[str, Callable[[int], float]] = {
        f"sync, {settings.rows} rows": lambda seed: random_steps(sync, settings.steps, seed),
        f"native, {settings.rows} rows": lambda seed: random_steps(native, settings.steps, seed),
    }
    return speeds(ways, settings.rows, settings)


def through_sb3(count: int, settings: Settings) -> list[dict[str, Any]]:
    """The native vector environment through our `VecEnvAdapter`, and SB3's own DummyVecEnv of as many single ones."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv  # a client's, not needed for the other rows

    from textenv.adapters.stable_baselines import VecEnvAdapter

    def seconds(env: VecEnv, seed: int) -> float:
        tokens = np.random.default_rng(seed).integers(0, env.action_space.n, (settings.steps, count))  # type: ignore[attr-defined]
        env.seed(seed)
        env.reset()
        started = time.perf_counter()
        for actions in tokens:
            env.step(actions)
        return time.perf_counter() - started

    dummy = DummyVecEnv([lambda: gym.make("TextGen-v0")] * count)
    adapter = VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=count, autoreset_mode="SameStep"))
    ways: dict[str, Callable[[int], float]] = {
        f"SB3 DummyVecEnv, {count} rows": lambda seed: seconds(dummy, seed),
        f"SB3 VecEnvAdapter, {count} rows": lambda seed: seconds(adapter, seed),
    }
    return speeds(ways, count, settings)


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
        env.reset(seed=settings.seed + repeat)  # its forward is no part of a step
        with forward_seconds(task.reference.model, task.reward.model.base_model) as total:
            seconds = more_random_steps(env, settings.steps, settings.seed + repeat)
        shares.append(1 - total[0] / seconds)
    return {"what": "share of a native step outside the models", "share": median(shares), "all": shares}


def growing_text(count: int, settings: Settings) -> dict[str, Any]:
    """Seconds of a step at context 200 over those at context 20, with a model of the embedded size and 256 places.

    One row shows whether anything is computed again. Many rows also read many cached keys and values for one set of
    weights: `ratio_of_reading_alone` is what the ratio would be if, as the text grows, nothing but reading the cache
    once took longer.
    """
    tokenizer = AutoTokenizer.from_pretrained(SUPERVISED)
    config = GPT2Config.from_pretrained(SUPERVISED, n_positions=256)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(settings.seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        env: Any = gym.make_vec(
            "TextGen-v0",
            num_envs=count,
            reference=folder,
            reward="benchmarks.env_step:nothing",
            max_prompt_tokens=16,
            max_new_tokens=220,
        )
        found = []
        for repeat in range(settings.repeats):
            early, late = growing_steps(env, repeat)
            reading = reading_seconds(env, 200) - reading_seconds(env, 24)
            found.append((early, late, late / early, 1 + reading / early))
    early, late, ratio, floor = (median(column) for column in zip(*found, strict=True))
    return {
        "what": f"step at context 200 over context 20, {count} rows",
        "ratio": ratio,
        "ratio_of_reading_alone": floor,
        "milliseconds_at_20": early * 1e3,
        "milliseconds_at_200": late * 1e3,
        "all": [each[2] for each in found],
    }


def growing_steps(env: Any, seed: int) -> tuple[float, float]:
    """Median seconds of the steps about context 24 and about context 200, as all rows grow together."""
    env.reset(seed=seed)
    tokens, seconds = np.full(env.num_envs, 5), []  # no stop token
    for _ in range(200):
        started = time.perf_counter()
        env.step(tokens)
        seconds.append(time.perf_counter() - started)
    early, late = (median(seconds[context - 16 - 8 : context - 16 + 8]) for context in (24, 200))
    return early, late


def reading_seconds(env: Any, context: int) -> float:
    """Seconds in which this machine reads the cached keys and values of that many tokens, layer after layer."""
    layers, seconds = env.dynamics.reference.cache.layers, []
    for _ in range(9):
        started = time.perf_counter()
        for layer in layers:
            layer.keys[:, :, :context].sum()
            layer.values[:, :, :context].sum()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(prompts)


def ready(settings: Settings) -> dict[str, Any]:
    """Seconds from `gym.make("TextGen-v0")` to the first observation, in this process's first use of it."""
    started = time.perf_counter()
    gym.make("TextGen-v0").reset(seed=settings.seed)
    return {"what": "seconds until the first observation", "seconds": time.perf_counter() - started}


def resident() -> tuple[float, float]:
    """MiB of this process: what is alive, and before that what it shows."""
    gc.collect()
    shown = psutil.Process().memory_info().rss
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20, shown / 2**20


def array_bytes(env: Any) -> int:
    """The reference's caches and logits, the state, and the bounds of the observation space."""
    reader, state, box = env.dynamics.reference, env.dynamics.state, env.observation_space["input_ids"]
    arrays = [reader.logits, state.input_ids, state.attention_mask, state.length]
    arrays += [box.low, box.high, box.bounded_below, box.bounded_above]
    arrays += [array for layer in reader.cache.layers for array in (layer.keys, layer.values)]
    return sum(array.nbytes for array in arrays)


def memory(settings: Settings) -> list[dict[str, Any]]:
    """Memory that 64 rows take beyond what one takes, beside their caches and arrays; its growth over many episodes."""
    models = gym.make("TextGen-v0")  # keeps them in memory all the while
    found = []
    for count in (settings.rows, 1, settings.rows):  # the first time for what the libraries allocate once
        env: Any = gym.make_vec("TextGen-v0", num_envs=count)
        random_steps(env, 2 * settings.steps, settings.seed)
        found.append((*resident(), array_bytes(env) / 2**20))
        del env
    _, (alive_of_one, _, arrays_of_one), (alive, shown, arrays) = found
    short = gym.make_vec("TextGen-v0", num_envs=settings.rows, max_new_tokens=2)
    played, sizes = 0, []
    tokens = np.full(settings.rows, 5)
    short.reset(seed=settings.seed)
    while played < settings.episodes:
        played += int(short.step(tokens)[2].sum())
        if played == 2_048 or played >= settings.episodes:
            sizes.append(resident())
    models.close()
    return [
        {
            "what": f"memory of {settings.rows} rows beyond that of one, MiB",
            "alive": alive - alive_of_one,
            "caches_and_arrays": arrays - arrays_of_one,
            "with_what_the_allocator_keeps": shown - alive_of_one,
        },
        {
            "what": "growth from 2,048 episodes on, MiB",
            "episodes": played,
            "alive": sizes[-1][0] - sizes[0][0],
            "with_what_the_allocator_keeps": sizes[-1][1] - sizes[0][1],
        },
    ]


def main(settings: Settings) -> None:
    """Measures all six and prints a table."""
    results = [
        ready(settings),
        *memory(settings),
        *against_single(settings),
        *(row for count in settings.sb3_rows for row in through_sb3(count, settings)),
        outside_models(settings),
        *(growing_text(count, settings) for count in (1, settings.rows)),
    ]
    path = rows.write("env_step", results, vars(settings) | {"textenv": textenv.__version__})
    for row in results:
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, int | float))
        print(f"{row['what']:48} {numbers}")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
