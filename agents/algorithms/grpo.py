"""Group relative policy optimization (GRPO: Shao et al. 2024): no critic, returns standardized within a group.

The advantage of a response, and of each of its tokens, is its return in standard deviations from the mean return of the
responses to its prompt. The KL to the reference is a term of the loss. Two later changes are settings: `aggregation`
token gives long responses more weight (DAPO: Yu et al. 2025), and `normalize` off skips the division by the standard
deviation (Dr. GRPO: Liu et al. 2025, who also divide by a constant length where `token` takes the minibatch's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict

from agents.config import check_choice, check_counts
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import ActorOnly, add_penalized_reward
from agents.objectives.advantages import group_centered, group_normalized, sequence_weights, token_weights
from agents.objectives.group import add_response_advantages, check_group_size, group_metrics, undiscounted_returns
from agents.objectives.losses import KL_LOSS_UNREAD, KL_LOSSES, available_kl_loss, clipped_terms
from textenv.settings import check_types
from textenv.unread import Unread

AGGREGATIONS = {"sequence": sequence_weights, "token": token_weights}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of GRPO."""

    epochs: int = 1  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability is clipped to 1 ± clip
    aggregation: str = "sequence"  # equal weight in a minibatch for each sequence (response), or for each token
    normalize: bool = True  # divide by the standard deviation of a group's returns
    kl_loss: str = "k3"  # none: the KL is in the reward; k2 or k3: this estimator of it is in the loss

    UNREAD: ClassVar[tuple[Unread, ...]] = (KL_LOSS_UNREAD,)

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("epochs",))
        check_choice(self, "aggregation", tuple(AGGREGATIONS))
        check_choice(self, "kl_loss", KL_LOSSES)
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")


class GRPO:
    """Clipped policy gradient with advantages relative to the group."""

    on_policy = True
    ratios = True
    target_kl = 0.0

    def __init__(self, config: GRPOConfig, factory: NetworkFactory) -> None:
        self.config, self.group_size = config, check_group_size(factory)
        self.networks = ActorOnly(factory)
        self.step_weights = AGGREGATIONS[config.aggregation]
        self.kl_loss = available_kl_loss(config.kl_loss, factory)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward` and `advantage`, [B, R] each."""
        add_penalized_reward(rollout, self.kl_loss)
        returns = undiscounted_returns(rollout["reward"], rollout["mask"])  # [B]
        compare = group_normalized if self.config.normalize else group_centered
        add_response_advantages(rollout, compare(returns, self.group_size))
        return group_metrics(returns, self.group_size)

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`policy_loss`, and `kl_loss` if it is on; diagnostics of the ratio."""
        yield clipped_terms(self.networks.actor.distribution(batch), batch, self.config.clip, self.kl_loss)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Do nothing: there are no target networks."""
