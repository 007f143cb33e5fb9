"""Default settings by task and algorithm, which the command line overrides.

A task of text is the embedded one if its reference is, whatever the id. Those of the embedded task suit a model of a
few million weights; another model gets the rates that the field uses for pretrained ones (TRL, OpenRLHF and verl: 1e-6
to 3e-6 for the actor, 1e-5 for the critic).

Those of classic control start from RL Baselines3 Zoo's tuned hyperparameters (Raffin 2020,
https://github.com/DLR-RM/rl-baselines3-zoo); `benchmarks/classic_control.py` measures them with the learners here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig, id_of
from agents.domains import TEXT, arguments_of, domain_of, entry_point_of
from agents.text.experiment import make_env
from textenv.env import TextGenEnv
from textenv.task import is_embedded


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Differences from the defaults of the three parts of a configuration."""

    train: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)


def _rates(rate: float, **others: Any) -> dict[str, Any]:
    """One learning rate for all networks, with further settings."""
    return {"learning_rate": rate, "critic_learning_rate": rate, **others}


NORMALIZED = {"normalize_observation": True, "normalize_reward": True}

GROUPS = {"env_arg": ("group_size=4",)}  # for learners that compare the responses to a prompt

# Text, by algorithm: the embedded task, and any other reference.
REVIEWS: dict[str, Preset] = {
    "a2c": Preset(train={"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "minibatch_size": 16}),
    "reinforce": Preset(train={"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "minibatch_size": 16}),
    "rloo": Preset(train={"learning_rate": 5e-4, "minibatch_size": 16, **GROUPS}, algorithm={"epochs": 2}),
    "grpo": Preset(train={"learning_rate": 5e-4, "minibatch_size": 16, **GROUPS}),
}
PRETRAINED = Preset(train={"learning_rate": 1e-6, "critic_learning_rate": 1e-5})
ANY_REFERENCE: dict[str, Preset] = {
    "rloo": Preset(train={"learning_rate": 1e-6, **GROUPS}),
    "grpo": Preset(train={"learning_rate": 1e-6, **GROUPS}),
    "dqn": Preset(train={"critic_learning_rate": 1e-6}),  # its Q-network is the language model
    "sac": Preset(train=_rates(1e-6)),  # likewise
}

# Times a preset's learning rates under `--lora-rank`: what LoRA needs beside training all weights, whatever the rank
# (Schulman and Thinking Machines 2025, "LoRA Without Regret").
ADAPTERS = 10

# Control, by id and algorithm.
PRESETS: dict[str, dict[str, Preset]] = {
    "CartPole-v1": {
        "ppo": Preset(  # 99,840 frames
            train=_rates(1e-3, iterations=390, minibatch_size=256, max_grad_norm=0.5, checkpoint_every=50),
            settings={"num_envs": 8, "steps": 32},
            algorithm={"epochs": 20, "gamma": 0.98, "lmbda": 0.8, "value_clip": 0.0},
        ),
        "a2c": Preset(  # 499,968 frames
            train=_rates(7e-4, iterations=7812, minibatch_size=64, max_grad_norm=0.5, checkpoint_every=1000),
            settings={"num_envs": 8, "steps": 8},
            algorithm={"gamma": 0.99, "lmbda": 1.0, "whiten": False},
        ),
        "reinforce": Preset(  # 499,712 frames
            train=_rates(3e-3, iterations=488, minibatch_size=1024, max_grad_norm=0.5, checkpoint_every=100),
            settings={"num_envs": 8, "steps": 128},
            algorithm={"gamma": 0.99},
        ),
        "dqn": Preset(  # 49,920 frames
            train=_rates(2.3e-3, iterations=195, minibatch_size=64, max_grad_norm=10.0, checkpoint_every=50),
            settings={"num_envs": 8, "steps": 32, "hidden": (256, 256), "activation": "relu"},
            algorithm={
                "buffer_size": 50_000,
                "learning_starts": 1000,
                "gradient_steps": 128,
                "gamma": 0.99,
                "tau": 1.0,
                "target_update_interval": 128,
                "loss_function": "smooth_l1",
                "epsilon_end": 0.04,
                "epsilon_updates": 4000,
            },
        ),
        "sac": Preset(  # 49,920 frames
            train=_rates(1e-3, iterations=195, minibatch_size=64, max_grad_norm=10.0, checkpoint_every=50),
            settings={"num_envs": 8, "steps": 32, "normalize_observation": True},
            algorithm={
                "buffer_size": 50_000,
                "learning_starts": 1000,
                "gradient_steps": 128,
                "gamma": 0.99,
                "tau": 0.02,
                "target_entropy": 0.8,
            },
        ),
    },
    "Acrobot-v1": {
        "ppo": Preset(  # 499,712 frames
            train=_rates(3e-4, iterations=122, minibatch_size=64, max_grad_norm=0.5, checkpoint_every=20),
            settings={"num_envs": 16, "steps": 256, **NORMALIZED},
            algorithm={"epochs": 4, "gamma": 0.99, "lmbda": 0.94, "value_clip": 0.0},
        ),
    },
    "MountainCar-v0": {
        "ppo": Preset(  # 999,936 frames
            train=_rates(3e-4, iterations=3906, minibatch_size=64, max_grad_norm=0.5, checkpoint_every=400),
            settings={"num_envs": 16, "steps": 16, **NORMALIZED},
            algorithm={"epochs": 4, "gamma": 0.99, "lmbda": 0.98, "value_clip": 0.0},
        ),
    },
    "Pendulum-v1": {
        "ppo": Preset(  # 299,008 frames
            train=_rates(1e-3, iterations=73, minibatch_size=64, max_grad_norm=0.5, checkpoint_every=10),
            settings={"num_envs": 4, "steps": 1024},
            algorithm={"epochs": 10, "gamma": 0.9, "lmbda": 0.95, "value_clip": 0.0},
        ),
    },
    "LunarLander-v3": {
        "ppo": Preset(  # 999,424 frames
            train=_rates(5e-4, iterations=244, minibatch_size=256, max_grad_norm=0.5, checkpoint_every=40),
            settings={"num_envs": 16, "steps": 256, **NORMALIZED},
            algorithm={"epochs": 8, "gamma": 0.99, "lmbda": 0.98, "value_clip": 0.0, "entropy_coef": 0.01},
        ),
    },
}

_ANY = _rates(3e-4, iterations=250, minibatch_size=256, max_grad_norm=0.5, checkpoint_every=50)
_A2C = _ANY | {"iterations": 7812, "minibatch_size": 64, "checkpoint_every": 1000}
_REPLAY = {"buffer_size": 50_000, "learning_starts": 1000, "gradient_steps": 128, "gamma": 0.99, "tau": 0.005}

# Control environments without a preset of their own.
CONTROL: dict[str, Preset] = {
    "ppo": Preset(train=_ANY, settings=NORMALIZED, algorithm={"gamma": 0.99, "value_clip": 0.0}),
    "a2c": Preset(train=_A2C, settings={"steps": 8}, algorithm={"gamma": 0.99}),
    "reinforce": Preset(train=_ANY | {"minibatch_size": 1024}, settings=NORMALIZED, algorithm={"gamma": 0.99}),
    "dqn": Preset(train=_ANY | {"minibatch_size": 64}, settings={"steps": 32}, algorithm=_REPLAY),
    "sac": Preset(train=_ANY | {"minibatch_size": 64}, settings={"steps": 32}, algorithm=_REPLAY),
}


def defaults(
    env: str, algorithm: str, env_arguments: Mapping[str, Any] | None = None, adapters: bool = False
) -> tuple[TrainConfig, Any, Any]:
    """Shared settings, the domain's and the algorithm's, for an environment and an algorithm by name.

    env_arguments, adapters: keyword arguments of gym.make, and whether `lora_rank` is above 0, which decide the preset;
    they are not part of the result. Raises ValueError for unknown names.
    """
    (algorithm_settings, _), domain = find_algorithm(algorithm), domain_of(env)
    _, preset = find_preset(env, algorithm, env_arguments or {}, adapters)
    return (
        TrainConfig(env=env, algorithm=algorithm, **preset.train),
        domain.settings(**preset.settings),
        algorithm_settings(**preset.algorithm),
    )


def find_preset(
    env: str, algorithm: str, env_arguments: Mapping[str, Any], adapters: bool = False
) -> tuple[str, Preset]:
    """The preset of a task and an algorithm, and the task's name in words."""
    if domain_of(env) is TEXT:
        task, preset = "a pretrained model", ANY_REFERENCE.get(algorithm, PRETRAINED)
        if is_embedded_task(env, env_arguments):
            task, preset = "the embedded task", REVIEWS.get(algorithm, Preset())
        return (f"{task} with adapters", _with_adapters(preset)) if adapters else (task, preset)
    if algorithm in PRESETS.get(id_of(env), {}):
        return id_of(env), PRESETS[id_of(env)][algorithm]
    return "any environment of vectors", CONTROL.get(algorithm, Preset())


def has_adapters(settings: Any) -> bool:
    """Whether settings of a domain ask for adapters; those of control have none."""
    return getattr(settings, "lora_rank", 0) > 0


def _with_adapters(preset: Preset) -> Preset:
    """The preset with the learning rates of adapters."""
    both = ("learning_rate", "critic_learning_rate")
    names = [name for name in both if name in preset.train] or both  # a preset names the rates that its learner has
    rates = {name: ADAPTERS * preset.train.get(name, getattr(TrainConfig, name)) for name in names}
    return replace(preset, train=preset.train | rates)


_found: dict[tuple[Any, str], bool] = {}  # class and arguments -> whether it was the embedded task


def is_embedded_task(env: str, env_arguments: Mapping[str, Any]) -> bool:
    """Whether the reference of a text environment is the embedded task's.

    A class with a constructor of its own may set it: it is made.
    """
    arguments, kind = {**gym.spec(id_of(env)).kwargs, **env_arguments}, entry_point_of(env)
    if kind.__init__ is TextGenEnv.__init__:
        reference = arguments.get("reference")
        return reference is None or is_embedded(reference)
    key = (kind, repr(arguments))
    if key not in _found:
        quiet = {name: value for name, value in arguments.items() if name != "render_mode"}  # opens no window
        core: Any = make_env(env, quiet).unwrapped
        _found[key] = is_embedded(core.task.config.reference)
    return _found[key]


def describe_rates(config: TrainConfig, adapters: bool = False) -> str:
    """The preset of a run in a line, and the run's own learning rates where they are others."""
    _, preset = find_preset(config.env, config.algorithm, arguments_of(config), adapters)
    rates = {name: value for name, value in preset.train.items() if name.endswith("learning_rate")}
    others = [f"{name} {getattr(config, name):g}" for name in rates if getattr(config, name) != rates[name]]
    source = describe_defaults(config, adapters)
    return f"{source} This run has {', '.join(others)}." if others else source


def describe_defaults(config: TrainConfig, adapters: bool = False) -> str:
    """Which preset the defaults come from, in a line."""
    task, preset = find_preset(config.env, config.algorithm, arguments_of(config), adapters)
    rates = {name: value for name, value in preset.train.items() if name.endswith("learning_rate")}
    listed = "".join(f", {name} {value:g}" for name, value in rates.items())
    return f"Defaults: {config.algorithm} on {task}{listed}."
