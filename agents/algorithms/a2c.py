"""Advantage actor-critic (Mnih et al. 2016): one pass over each rollout.

Losses `−Â log π` and `½ (V − target)²` at every step, advantages by GAE. The gradient is PPO's at a ratio of 1. A
minibatch of the whole rollout keeps it exact; smaller ones take several steps, the later ones slightly off-policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict
from torch import Tensor

from agents.config import check_not_negative, check_shares
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import ActorCritic, add_advantages, add_penalized_reward
from agents.objectives.advantages import token_weights
from agents.objectives.losses import policy_gradient, value_loss
from textenv.settings import check_types
from textenv.unread import Unread


@dataclass(frozen=True, kw_only=True)
class A2CConfig:
    """Settings of A2C."""

    epochs: ClassVar[int] = 1  # there is no ratio to correct a second pass
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0 skips its cost
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # GAE's mix of TD errors (0) and whole returns (1)
    whiten: bool = True  # standardize the advantages of a rollout

    UNREAD: ClassVar[tuple[Unread, ...]] = ()  # all are read

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(self, ("entropy_coef",))
        check_shares(self, ("gamma", "lmbda"))


class A2C:
    """Policy gradient with GAE advantages, and a critic fitted to their value targets."""

    on_policy = True
    ratios = False
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: A2CConfig, factory: NetworkFactory) -> None:
        self.config, self.networks = config, ActorCritic(factory)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward`, values, advantages and value targets; see `add_advantages`."""
        add_penalized_reward(rollout)
        config, value = self.config, self.networks.state_values(rollout)
        return add_advantages(rollout, value, config.gamma, config.lmbda, config.whiten)

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`policy_loss`, with an entropy bonus `entropy_loss`, and `value_loss`; no diagnostics."""
        yield self._policy_loss(batch), {}
        value = self.networks.critic.values(batch).where(batch["mask"], 0.0)  # [B, R]
        yield {"value_loss": value_loss(value, batch["value_target"])}, {}

    def _policy_loss(self, batch: TensorDict) -> dict[str, Tensor]:
        distribution = self.networks.actor.distribution(batch)
        log_prob = distribution.log_prob(batch["action"]).where(batch["mask"], 0.0)  # [B, R]
        terms = {"policy_loss": policy_gradient(log_prob, batch["advantage"])}
        if self.config.entropy_coef > 0:
            terms["entropy_loss"] = -self.config.entropy_coef * distribution.entropy()
        return terms

    def after_step(self, metrics: dict[str, float]) -> None:
        """Do nothing: there are no target networks."""
