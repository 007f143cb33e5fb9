"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): no critic, siblings are the baseline.

The advantage of a response, and of each of its tokens, is its penalized return minus the mean return of the other
responses to its prompt. Every token of a minibatch has equal weight, as in the sum of log-probabilities over a
response; the paper averages over responses, so minibatches differ from it by their mean length. Ratios are per token:
in a single pass they stay so close to 1 that the clip hardly acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict

from agents.config import check_choice, check_counts
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import ActorOnly, add_penalized_reward
from agents.objectives.advantages import leave_one_out, token_weights
from agents.objectives.group import add_response_advantages, check_group_size, group_metrics, undiscounted_returns
from agents.objectives.losses import KL_LOSS_UNREAD, KL_LOSSES, available_kl_loss, clipped_terms
from textenv.settings import check_types
from textenv.unread import Unread


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of RLOO."""

    epochs: int = 1  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability is clipped to 1 ± clip
    kl_loss: str = "none"  # none: the KL is in the reward; k2 or k3: this estimator of it is in the loss

    UNREAD: ClassVar[tuple[Unread, ...]] = (KL_LOSS_UNREAD,)

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("epochs",))
        check_choice(self, "kl_loss", KL_LOSSES)
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")


class RLOO:
    """Clipped policy gradient with the leave-one-out baseline."""

    on_policy = True
    ratios = True
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: RLOOConfig, factory: NetworkFactory) -> None:
        self.config, self.group_size = config, check_group_size(factory)
        self.networks = ActorOnly(factory)
        self.kl_loss = available_kl_loss(config.kl_loss, factory)

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward` and `advantage`, [B, R] each."""
        add_penalized_reward(rollout, self.kl_loss)
        returns = undiscounted_returns(rollout["reward"], rollout["mask"])  # [B]
        add_response_advantages(rollout, leave_one_out(returns, self.group_size))
        return group_metrics(returns, self.group_size)

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`policy_loss`, and `kl_loss` if it is on; diagnostics of the ratio."""
        yield clipped_terms(self.networks.actor.distribution(batch), batch, self.config.clip, self.kl_loss)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Do nothing: there are no target networks."""
