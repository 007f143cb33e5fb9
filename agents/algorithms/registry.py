"""The learners by name: no name appears outside its own file, this dict and the presets."""

from __future__ import annotations

from agents.algorithms.a2c import A2C, A2CConfig
from agents.algorithms.dqn import DQN, DQNConfig
from agents.algorithms.grpo import GRPO, GRPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.reinforce import Reinforce, ReinforceConfig
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.algorithms.sac import SAC, SACConfig

ALGORITHMS: dict[str, tuple[type, type]] = {
    "a2c": (A2CConfig, A2C),
    "dqn": (DQNConfig, DQN),
    "grpo": (GRPOConfig, GRPO),
    "ppo": (PPOConfig, PPO),
    "reinforce": (ReinforceConfig, Reinforce),
    "rloo": (RLOOConfig, RLOO),
    "sac": (SACConfig, SAC),
}


def find_algorithm(name: str) -> tuple[type, type]:
    """An algorithm's configuration and its class."""
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}; known are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]
