"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): no critic, siblings are the baseline.

The advantage of a response is its shaped return, less the mean of those of the other responses to its prompt, and
every token of it gets the whole. Every token of a minibatch weighs the same, as in the sum of log-probabilities over
a response. Ratios are per token: with one pass they stay so near 1 that the clip hardly acts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_choice, check_counts
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import distribution_of, policy_of
from agents.objectives.advantages import leave_one_out, token_weights
from agents.objectives.group import group_metrics, group_of, returns, spread_advantages
from agents.objectives.losses import KL_LOSSES, clipped_terms, kl_loss_of, reward_key


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of RLOO."""

    epochs: int = 1  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability counts within 1 ± clip
    kl_loss: str = "none"  # none: the KL is a part of the reward; k2 or k3: this estimator is a term of the loss

    def __post_init__(self) -> None:
        check_counts(self, ("epochs",))
        check_choice(self, "kl_loss", KL_LOSSES)
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")


class RLOO:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: RLOOConfig, networks: NetworkFactory) -> None:
        self.config, self.group = config, group_of(networks)
        self.actor = networks.actor()
        self.policy = policy_of(self.actor)
        self.trained: dict[str, nn.Module] = {"actor": self.actor}
        self.targets: dict[str, nn.Module] = {}
        self.weights = token_weights
        self.kl_loss = kl_loss_of(config.kl_loss, networks)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds `advantage` [B, R, 1]."""
        total = returns(rollout, reward_key(self.kl_loss))  # [B]
        spread_advantages(rollout, leave_one_out(total, self.group))
        return group_metrics(total, self.group)

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        return clipped_terms(distribution_of(self.actor, batch), batch, self.config.clip, self.kl_loss)

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Nothing follows the actor."""
        return False
