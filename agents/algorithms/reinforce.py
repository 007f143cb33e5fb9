"""REINFORCE with baseline (Williams 1992; Sutton & Barto 2018, §13.4).

Loss `−(G − V) log π` at every step: the return that followed, minus the critic's estimate, which reduces the variance
of the gradient and leaves its mean unchanged. If a rollout ends within an episode, the critic's value stands for the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict

from agents.config import check_shares
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import ActorCritic, add_advantages, add_penalized_reward
from agents.objectives.advantages import token_weights
from agents.objectives.losses import policy_gradient, value_loss
from textenv.settings import check_types
from textenv.unread import Unread

WHOLE_RETURNS = 1.0  # GAE's λ: advantages are returns minus values


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE."""

    epochs: ClassVar[int] = 1  # there is no ratio to correct a second pass
    gamma: float = 1.0  # discount per step
    whiten: bool = True  # standardize the advantages of a rollout

    UNREAD: ClassVar[tuple[Unread, ...]] = ()  # all are read

    def __post_init__(self) -> None:
        check_types(self)
        check_shares(self, ("gamma",))


class Reinforce:
    """Policy gradient with whole returns, and a critic as the baseline."""

    on_policy = True
    ratios = False
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: ReinforceConfig, factory: NetworkFactory) -> None:
        self.config, self.networks = config, ActorCritic(factory)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward`, values, advantages and value targets; see `add_advantages`."""
        add_penalized_reward(rollout)
        config, value = self.config, self.networks.state_values(rollout)
        return add_advantages(rollout, value, config.gamma, WHOLE_RETURNS, config.whiten)

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`policy_loss` and `value_loss`; no diagnostics."""
        mask = batch["mask"]
        log_prob = self.networks.actor.distribution(batch).log_prob(batch["action"]).where(mask, 0.0)  # [B, R]
        yield {"policy_loss": policy_gradient(log_prob, batch["advantage"])}, {}
        value = self.networks.critic.values(batch).where(mask, 0.0)  # [B, R]
        yield {"value_loss": value_loss(value, batch["value_target"])}, {}

    def after_step(self, metrics: dict[str, float]) -> None:
        """Do nothing: there are no target networks."""
