"""Default settings by environment and algorithm, which the command line overrides.

Those of classic control start from RL Baselines3 Zoo's tuned hyperparameters (Raffin 2020,
https://github.com/DLR-RM/rl-baselines3-zoo); `benchmarks/classic_control.py` measures them with the learners here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig, id_of
from agents.domains import TEXT, domain_of


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

PRESETS: dict[str, dict[str, Preset]] = {
    "TextGen-v0": {
        "a2c": Preset(train={"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "minibatch_size": 16}),
        "reinforce": Preset(train={"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "minibatch_size": 16}),
        "rloo": Preset(
            train={"learning_rate": 5e-4, "minibatch_size": 16, "env_arg": ("group_size=4",)}, algorithm={"epochs": 2}
        ),
        "grpo": Preset(train={"learning_rate": 5e-4, "minibatch_size": 16, "env_arg": ("group_size=4",)}),
    },
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
        "sac": Preset(  # 49,920 frames; weak, about 250 of 500: benchmarks/LOG.md says what did not help
            train=_rates(1e-3, iterations=195, minibatch_size=64, max_grad_norm=10.0, checkpoint_every=50),
            settings={"num_envs": 8, "steps": 32},
            algorithm={
                "buffer_size": 50_000,
                "learning_starts": 1000,
                "gradient_steps": 128,
                "gamma": 0.99,
                "tau": 0.005,
                "target_entropy": 0.1,
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


def defaults(env: str, algorithm: str) -> tuple[TrainConfig, Any, Any]:
    """Shared settings, the domain's and the algorithm's, for an environment and an algorithm by name.

    Raises ValueError for unknown names.
    """
    (algorithm_settings, _), domain = find_algorithm(algorithm), domain_of(env)
    fallback = Preset() if domain is TEXT else CONTROL.get(algorithm, Preset())
    preset = PRESETS.get(id_of(env), {}).get(algorithm, fallback)
    return (
        TrainConfig(env=env, algorithm=algorithm, **preset.train),
        domain.settings(**preset.settings),
        algorithm_settings(**preset.algorithm),
    )
