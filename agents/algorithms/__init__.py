"""The learners by name. An algorithm is three verbs and a flag; no name appears outside its file and this dict."""

from __future__ import annotations

from typing import Any, Protocol

from tensordict import TensorDict
from torch import Tensor

from agents.algorithms.ppo import PPO, PPOConfig


class Algorithm(Protocol):
    """What the trainer asks of a learner."""

    on_policy: bool
    config: Any  # has `epochs`, the passes over each rollout

    def prepare(self, rollout: TensorDict, rows_per_pass: int) -> dict[str, float]:
        """Adds `advantage` and `value_target`; returns metrics."""
        ...

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named loss terms, and diagnostics: means over valid tokens."""
        ...

    def after_step(self) -> None:
        """Target networks, temperature, or nothing."""
        ...


ALGORITHMS: dict[str, tuple[type, type]] = {"ppo": (PPOConfig, PPO)}


def find_algorithm(name: str) -> tuple[type, type]:
    """An algorithm's configuration and its class."""
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}; known are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]
