"""The learners by name: no name appears outside its own file, this dict and the presets."""

from __future__ import annotations

from agents.algorithms.dqn import DQN, DQNConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.sac import SAC, SACConfig

ALGORITHMS: dict[str, tuple[type, type]] = {
    "dqn": (DQNConfig, DQN),
    "ppo": (PPOConfig, PPO),
    "sac": (SACConfig, SAC),
}


def find_algorithm(name: str) -> tuple[type, type]:
    """An algorithm's configuration and its class."""
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}; known are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]
