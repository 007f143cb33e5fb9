"""Proximal policy optimization (Schulman et al. 2017), as RLHF uses it (Ziegler et al. 2019).

Whole sequences, one forward pass a network and batch, padding masked out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_choice, check_counts, check_not_negative, check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import (
    add_advantages,
    add_whitened,
    distribution_of,
    output_of,
    policy_of,
)
from agents.objectives.advantages import token_weights
from agents.objectives.losses import (
    KL_LOSSES,
    clipped_terms,
    clipped_value_loss,
    dual_clipped,
    kl_loss_of,
    reward_key,
    value_loss,
)


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO."""

    epochs: int = 4  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability counts within 1 ± clip
    dual_clip: float = 0.0  # where the advantage is negative, ratios count up to this (3 is usual); 0 is off
    value_clip: float = 0.2  # a value may move this far from its old one before its gradient stops; 0 is off
    target_kl: float = 0.0  # updates on a rollout stop where old and new policy are this far apart, nats; 0 is off
    entropy_coef: float = 0.0  # weight of an entropy bonus; 0 saves its cost
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # GAE's mix of TD errors (0) and whole returns (1)
    whiten: bool = True  # advantages of a rollout to mean 0 and standard deviation 1
    kl_loss: str = "none"  # none: the KL is a part of the reward; k2 or k3: this estimator is a term of the loss

    def __post_init__(self) -> None:
        check_counts(self, ("epochs",))
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")
        check_not_negative(self, ("value_clip", "entropy_coef", "target_kl"))
        check_shares(self, ("gamma", "lmbda"))
        check_choice(self, "kl_loss", KL_LOSSES)
        if self.dual_clip != 0 and not self.dual_clip > 1 + self.clip:
            raise ValueError(f"dual_clip must be above 1 + clip, or 0 for none, got {self.dual_clip}; 3 is usual.")


class PPO:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: PPOConfig, networks: NetworkFactory) -> None:
        self.config, self.networks = config, networks
        self.actor, self.critic = networks.actor(), networks.critic()
        self.policy = policy_of(self.actor)
        self.trained: dict[str, nn.Module] = {"actor": self.actor, "critic": self.critic}
        self.targets: dict[str, nn.Module] = {}
        self.weights = token_weights
        self.kl_loss = kl_loss_of(config.kl_loss, networks)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds `state_value`, `advantage` (whitened) and `value_target`, all [B, R, 1]."""
        gamma, lmbda = self.config.gamma, self.config.lmbda
        metrics = add_advantages(rollout, self.networks, self.critic, gamma, lmbda, reward_key(self.kl_loss))
        add_whitened(rollout, self.config.whiten)
        return metrics

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        config, distribution = self.config, distribution_of(self.actor, batch)
        terms, diagnostics = clipped_terms(distribution, batch, config.clip, self.kl_loss)
        if config.dual_clip > 0:
            terms["policy_loss"] = dual_clipped(terms["policy_loss"], batch["advantage"][..., 0], config.dual_clip)
        terms["value_loss"] = self._value_loss(batch)
        if config.entropy_coef > 0:
            terms["entropy_loss"] = -config.entropy_coef * distribution.entropy()
        return terms, diagnostics

    def _value_loss(self, batch: TensorDict) -> Tensor:
        value, target = output_of(self.critic, batch)[..., 0], batch["value_target"][..., 0]  # [B, R] both
        if self.config.value_clip == 0:
            return value_loss(value, target)
        return clipped_value_loss(value, batch["state_value"][..., 0], target, self.config.value_clip)

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Whether the policy is as far from the old one as it may go (`target_kl`); PPO has no target networks."""
        return 0 < self.config.target_kl < metrics["approx_kl"]
