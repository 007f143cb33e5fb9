"""Proximal policy optimization (Schulman et al. 2017) as RLHF uses it (Ziegler et al. 2019).

policy loss = mean over steps of max(−Â ρ, −Â clip(ρ, 1 − ε, 1 + ε)),  ρ = exp(log π_new − log π_old)
value loss  = ½ mean over steps of max((V − target)², (V_old ± c clip − target)²)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict
from torch import Tensor

from agents.config import check_choice, check_counts, check_not_negative, check_shares
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import ActorCritic, add_advantages, add_penalized_reward
from agents.objectives.advantages import token_weights
from agents.objectives.losses import (
    KL_LOSS_UNREAD,
    KL_LOSSES,
    available_kl_loss,
    clipped_terms,
    clipped_value_loss,
    dual_clipped,
    value_loss,
)
from textenv.settings import check_types
from textenv.unread import Unread


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO."""

    epochs: int = 4  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability is clipped to 1 ± clip
    dual_clip: float = 0.0  # bound of the ratio where the advantage is negative (3 is usual); 0 is off
    value_clip: float = 0.2  # distance from the old value beyond which the value loss has no gradient; 0 is off
    # KL between old and new policy, nats per step; a minibatch above it ends the updates on its rollout, before its
    # step; 0 is off
    target_kl: float = 0.0
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0 skips its cost
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # GAE's mix of TD errors (0) and whole returns (1)
    whiten: bool = True  # standardize the advantages of a rollout
    kl_loss: str = "none"  # none: the KL is in the reward; k2 or k3: this estimator of it is in the loss

    UNREAD: ClassVar[tuple[Unread, ...]] = (KL_LOSS_UNREAD,)

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("epochs",))
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")
        check_not_negative(self, ("value_clip", "entropy_coef", "target_kl"))
        check_shares(self, ("gamma", "lmbda"))
        check_choice(self, "kl_loss", KL_LOSSES)
        if self.dual_clip != 0 and not self.dual_clip > 1 + self.clip:
            raise ValueError(f"dual_clip must be above 1 + clip, or 0 for none, got {self.dual_clip}; 3 is usual.")


class PPO:
    """Clipped policy gradient with GAE advantages, several passes over each rollout."""

    on_policy = True
    ratios = True
    step_weights = staticmethod(token_weights)

    def __init__(self, config: PPOConfig, factory: NetworkFactory) -> None:
        self.config, self.networks, self.target_kl = config, ActorCritic(factory), config.target_kl
        self.kl_loss = available_kl_loss(config.kl_loss, factory)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward`, values, advantages and value targets; see `add_advantages`."""
        add_penalized_reward(rollout, self.kl_loss)
        config, value = self.config, self.networks.state_values(rollout)
        return add_advantages(rollout, value, config.gamma, config.lmbda, config.whiten)

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`policy_loss`, `kl_loss` and `entropy_loss` if they are on, and `value_loss`; diagnostics of the ratio."""
        yield self._policy_loss(batch)
        yield {"value_loss": self._value_loss(batch)}, {}

    def _policy_loss(self, batch: TensorDict) -> Loss:
        config, distribution = self.config, self.networks.actor.distribution(batch)
        terms, diagnostics = clipped_terms(distribution, batch, config.clip, self.kl_loss)
        if config.dual_clip > 0:
            terms["policy_loss"] = dual_clipped(terms["policy_loss"], batch["advantage"], config.dual_clip)
        if config.entropy_coef > 0:
            terms["entropy_loss"] = -config.entropy_coef * distribution.entropy()
        return terms, diagnostics

    def _value_loss(self, batch: TensorDict) -> Tensor:
        value = self.networks.critic.values(batch).where(batch["mask"], 0.0)  # [B, R]
        target = batch["value_target"]  # [B, R]
        if self.config.value_clip == 0:
            return value_loss(value, target)
        return clipped_value_loss(value, batch["state_value"], target, self.config.value_clip)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Do nothing: there are no target networks."""
