"""Cost of an environment step: time compared with single environments, time outside the models, and memory.

`python -m benchmarks.env_step`. Actions are random tokens, so only the environment is measured. Six measurements: the
time until the first observation; the speed-up of the native vector environment over single ones; the speed-up that is
left through Stable-Baselines3's interface; the share of a native step outside the model forwards; the cost of a step as
the text grows; and memory beyond caches and arrays.

Memory is reported twice: live memory, after `malloc_trim` has returned free memory to the system (Linux with glibc),
and the resident memory before that, which includes what the allocator keeps for the next forwards. With 64 rows of the
embedded models, a forward over all prompts needs 11 MiB at its peak, and the reward model's forward over 64 whole texts
32 MiB (torch's profiler).
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
    """Sizes and repeats."""

    rows: int = 64  # parallel episodes
    sb3_rows: tuple[int, ...] = (16, 64)  # parallel episodes through Stable-Baselines3
    steps: int = 48  # environment steps per repeat
    repeats: int = 5  # per method, interleaved; the median is reported
    episodes: int = 20_000  # episodes of the memory measurement
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


def speeds(methods: dict[str, Callable[[int], float]], count: int, settings: Settings) -> list[dict[str, Any]]:
    """Environment steps per second of each method, interleaved, and their ratio to those of the first method.

    A method takes a seed and returns the seconds of `settings.steps` steps of `count` rows.
    """
    measured: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(settings.repeats):
        for name, method in methods.items():
            measured[name].append(settings.steps * count / method(settings.seed + repeat))
    base = median(next(iter(measured.values())))
    return [
        {"what": name, "steps_per_second": median(values), "ratio": median(values) / base, "all": values}
        for name, values in measured.items()
    ]


def against_single(settings: Settings) -> list[dict[str, Any]]:
    """The native vector environment and a SyncVectorEnv of the same number of rows."""
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0")] * settings.rows, autoreset_mode=AutoresetMode.NEXT_STEP)
    native = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    methods: dict[str, Callable[[int], float]] = {
        f"sync, {settings.rows} rows": lambda seed: random_steps(sync, settings.steps, seed),
        f"native, {settings.rows} rows": lambda seed: random_steps(native, settings.steps, seed),
    }
    return speeds(methods, settings.rows, settings)


def through_sb3(count: int, settings: Settings) -> list[dict[str, Any]]:
    """The native vector environment through `VecEnvAdapter`, and SB3's DummyVecEnv of the same number of rows."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv  # optional: the other rows do not need it

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
    methods: dict[str, Callable[[int], float]] = {
        f"SB3 DummyVecEnv, {count} rows": lambda seed: seconds(dummy, seed),
        f"SB3 VecEnvAdapter, {count} rows": lambda seed: seconds(adapter, seed),
    }
    return speeds(methods, count, settings)


@contextmanager
def forward_seconds(*models: torch.nn.Module) -> Iterator[list[float]]:
    """Yield a list whose only entry sums the seconds spent in the forwards of the models."""
    total, started = [0.0], [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        total[0] += time.perf_counter() - started[0]

    hooks = [model.register_forward_pre_hook(before) for model in models]
    hooks += [model.register_forward_hook(after) for model in models]
    yield total
    for hook in hooks:
        hook.remove()


def outside_models(settings: Settings) -> dict[str, Any]:
    """Share of a native step spent outside the model forwards."""
    env: Any = gym.make_vec("TextGen-v0", num_envs=settings.rows)
    assert isinstance(env, TextGenVectorEnv)
    task: Any = env.task
    shares = []
    for repeat in range(settings.repeats):
        env.reset(seed=settings.seed + repeat)  # the reset's forward is not part of a step
        with forward_seconds(task.reference.model, task.reward.model.base_model) as total:
            seconds = more_random_steps(env, settings.steps, settings.seed + repeat)
        shares.append(1 - total[0] / seconds)
    return {"what": "share of a native step outside the models", "share": median(shares), "all": shares}


def growing_text(count: int, settings: Settings) -> dict[str, Any]:
    """Time of a step at context 200 over one at context 20, for a model of the embedded size with 256 positions.

    With one row, the ratio shows whether anything is recomputed. With many rows, reading cached keys and values takes a
    share of the time: `ratio_of_reading_alone` is the ratio if only reading the cache once grew with the text.
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
        measured = []
        for repeat in range(settings.repeats):
            early, late = growing_steps(env, repeat)
            reading = reading_seconds(env, 200) - reading_seconds(env, 24)
            measured.append((early, late, late / early, 1 + reading / early))
    early, late, ratio, floor = (median(values) for values in zip(*measured, strict=True))
    return {
        "what": f"step at context 200 over context 20, {count} rows",
        "ratio": ratio,
        "ratio_of_reading_alone": floor,
        "milliseconds_at_20": early * 1e3,
        "milliseconds_at_200": late * 1e3,
        "all": [repeat[2] for repeat in measured],
    }


def growing_steps(env: Any, seed: int) -> tuple[float, float]:
    """Median seconds of a step around context 24 and around context 200, while all rows grow together."""
    env.reset(seed=seed)
    tokens, seconds = np.full(env.num_envs, 5), []  # not a stop token
    for _ in range(200):
        started = time.perf_counter()
        env.step(tokens)
        seconds.append(time.perf_counter() - started)
    early, late = (median(seconds[context - 16 - 8 : context - 16 + 8]) for context in (24, 200))
    return early, late


def reading_seconds(env: Any, context: int) -> float:
    """Median seconds to read the cached keys and values of `context` tokens in all layers."""
    layers, seconds = env.dynamics.reference.cache.layers, []
    for _ in range(9):
        started = time.perf_counter()
        for layer in layers:
            layer.keys[:, :, :context].sum()
            layer.values[:, :, :context].sum()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward of 0 that takes no time."""
    return [0.0] * len(prompts)


def ready(settings: Settings) -> dict[str, Any]:
    """Seconds from `gym.make("TextGen-v0")` to the first observation, on first use in this process."""
    started = time.perf_counter()
    gym.make("TextGen-v0").reset(seed=settings.seed)
    return {"what": "seconds until the first observation", "seconds": time.perf_counter() - started}


def resident() -> tuple[float, float]:
    """Memory of this process in MiB: live memory after trimming, and resident memory before it."""
    gc.collect()
    untrimmed = psutil.Process().memory_info().rss
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20, untrimmed / 2**20


def array_bytes(env: Any) -> int:
    """Bytes of the reference's cache and logits, the state, and the bounds of the observation space."""
    decoder, state, box = env.dynamics.reference, env.dynamics.state, env.observation_space["input_ids"]
    arrays = [decoder.logits, state.input_ids, state.attention_mask, state.length]
    arrays += [box.low, box.high, box.bounded_below, box.bounded_above]
    arrays += [array for layer in decoder.cache.layers for array in (layer.keys, layer.values)]
    return sum(array.nbytes for array in arrays)


def memory(settings: Settings) -> list[dict[str, Any]]:
    """Memory of all rows beyond that of one row, with the part of caches and arrays; and growth over many episodes."""
    models = gym.make("TextGen-v0")  # keeps the models in memory throughout
    measured = []
    for count in (settings.rows, 1, settings.rows):  # the first pass only warms up the libraries
        env: Any = gym.make_vec("TextGen-v0", num_envs=count)
        random_steps(env, 2 * settings.steps, settings.seed)
        measured.append((*resident(), array_bytes(env) / 2**20))
        del env
    _, (alive_of_one, _, arrays_of_one), (alive, untrimmed, arrays) = measured
    short = gym.make_vec("TextGen-v0", num_envs=settings.rows, max_new_tokens=2)
    episodes, sizes = 0, []
    tokens = np.full(settings.rows, 5)
    short.reset(seed=settings.seed)
    while episodes < settings.episodes:
        episodes += int(short.step(tokens)[2].sum())
        if episodes == 2_048 or episodes >= settings.episodes:
            sizes.append(resident())
    models.close()
    return [
        {
            "what": f"memory of {settings.rows} rows beyond that of one, MiB",
            "alive": alive - alive_of_one,
            "caches_and_arrays": arrays - arrays_of_one,
            "with_what_the_allocator_keeps": untrimmed - alive_of_one,
        },
        {
            "what": "growth from 2,048 episodes on, MiB",
            "episodes": episodes,
            "alive": sizes[-1][0] - sizes[0][0],
            "with_what_the_allocator_keeps": sizes[-1][1] - sizes[0][1],
        },
    ]


def main(settings: Settings) -> None:
    """Run all measurements and print a table."""
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
