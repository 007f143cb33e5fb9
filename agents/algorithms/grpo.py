"""Group relative policy optimization (GRPO: Shao et al. 2024): no critic, returns are standardized within a group.

The advantage of a response is its return in standard deviations from the mean of the responses to its prompt, and
every token of it gets the whole. The KL to the reference is a term of the loss. Later papers change two things:
`aggregation` token lets long responses weigh more (DAPO: Yu et al. 2025), and `normalize` off divides by no deviation
(Dr. GRPO: Liu et al. 2025, who divide by a constant length besides, where `token` takes the minibatch's own).
"""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_choice, check_counts
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import distribution_of, policy_of
from agents.objectives.advantages import group_centered, group_normalized, sequence_weights, token_weights
from agents.objectives.group import group_metrics, group_of, returns, spread_advantages
from agents.objectives.losses import KL_LOSSES, clipped_terms, kl_loss_of, reward_key

AGGREGATIONS = {"sequence": sequence_weights, "token": token_weights}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of GRPO."""

    epochs: int = 1  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability counts within 1 ± clip
    aggregation: str = "sequence"  # what counts the same in a minibatch: each sequence (response), or each token
    normalize: bool = True  # divide by the standard deviation of a group's returns
    kl_loss: str = "k3"  # none: the KL is a part of the reward; k2 or k3: this estimator is a term of the loss

    def __post_init__(self) -> None:
        check_counts(self, ("epochs",))
        check_choice(self, "aggregation", tuple(AGGREGATIONS))
        check_choice(self, "kl_loss", KL_LOSSES)
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")


class GRPO:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: GRPOConfig, networks: NetworkFactory) -> None:
        self.config, self.group = config, group_of(networks)
        self.actor = networks.actor()
        self.policy = policy_of(self.actor)
        self.trained: dict[str, nn.Module] = {"actor": self.actor}
        self.targets: dict[str, nn.Module] = {}
        self.weights = AGGREGATIONS[config.aggregation]
        self.kl_loss = kl_loss_of(config.kl_loss, networks)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds `advantage` [B, R, 1]."""
        total = returns(rollout, reward_key(self.kl_loss))  # [B]
        compare = group_normalized if self.config.normalize else group_centered
        spread_advantages(rollout, compare(total, self.group))
        return group_metrics(total, self.group)

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        return clipped_terms(distribution_of(self.actor, batch), batch, self.config.clip, self.kl_loss)

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Nothing follows the actor."""
        return False
