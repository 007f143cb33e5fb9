"""Deep Q-learning (Mnih et al. 2015) with double estimates (van Hasselt et al. 2016), soft or epsilon-greedy.

At a temperature above 0 it is soft Q-learning (Haarnoja et al. 2017): see objectives/soft_q.py for what that has to do
with the KL penalty. At temperature 0 it is DQN as it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_counts, check_not_negative, check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import ends_of, inside
from agents.objectives.advantages import token_weights
from agents.objectives.soft_q import (
    LOSSES,
    Target,
    action_targets,
    check_discrete,
    check_replay,
    chosen,
    read,
    soft_value,
)


@dataclass(frozen=True, kw_only=True)
class DQNConfig:
    """Settings of DQN."""

    buffer_size: int = 2048  # rows that are remembered: responses, or steps of another environment
    learning_starts: int = 128  # rows before the first update
    gradient_steps: int = 16  # optimizer steps after each rollout
    temperature: float | None = None  # α; default the KL penalty's β, or 0, epsilon-greedy, where there is no penalty
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # mix of one-step targets (0) and whole returns (1), within a row
    double: bool = True  # the online network chooses the next action, the target network says its worth
    target_update_interval: int = 1  # optimizer steps between updates of the target network
    tau: float = 0.05  # share of the online weights that it takes then
    loss_function: str = "l2"  # of TD errors: l2, their square, or smooth_l1, linear where they are above 1
    epsilon_start: float = 1.0  # share of random actions to begin with; at temperature 0 alone
    epsilon_end: float = 0.05  # and in the end
    epsilon_updates: int = 10_000  # optimizer steps from the one to the other

    def __post_init__(self) -> None:
        check_replay(self)
        check_counts(self, ("epsilon_updates",))
        check_shares(self, ("epsilon_start", "epsilon_end"))
        if self.temperature is not None:
            check_not_negative(self, ("temperature",))


class DQN:
    """The three verbs of an algorithm."""

    on_policy = False

    def __init__(self, config: DQNConfig, networks: NetworkFactory) -> None:
        check_discrete(networks)
        self.config = config
        self.temperature = networks.temperature if config.temperature is None else config.temperature
        self.q_network = networks.q_network(self.temperature)
        self.policy = inside(self.q_network)
        self.target = Target(self.q_network, config.target_update_interval, config.tau)
        self.trained: dict[str, nn.Module] = {"q_network": self.q_network}
        self.targets: dict[str, nn.Module] = {"q_network": self.target}
        self.weights = token_weights
        self._explore()

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Nothing: targets are made anew whenever a row is drawn."""
        return {}

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        config, action = self.config, batch["action"]
        online = read(self.q_network, batch)  # [B, R + 1, A]
        with torch.no_grad():
            target = read(self.target.network, batch)  # [B, R + 1, A]
            value = soft_value(online if config.double else target, target, self.temperature)  # [B, R + 1]
            old = chosen(target[:, :-1], action)  # [B, R]
            wanted = action_targets(batch["reward"], value, old, ends_of(batch), config.gamma, config.lmbda)
        found = chosen(online[:, :-1], action)  # [B, R]
        loss = LOSSES[config.loss_function](found, wanted, reduction="none")
        return {"q_loss": loss}, {"q_value": found.detach().where(batch["mask"], 0.0).sum()}

    def after_step(self, metrics: dict[str, float]) -> bool:
        """The target network follows, and epsilon falls."""
        self.target.follow(self.q_network)
        self._explore()
        return False

    def _explore(self) -> None:
        if self.temperature == 0:
            config = self.config
            share = min(int(self.target.steps) / config.epsilon_updates, 1.0)
            policy: Any = self.policy
            policy.epsilon.fill_(config.epsilon_start + share * (config.epsilon_end - config.epsilon_start))
