"""What the on-policy learners share: their networks, and the values, advantages and value targets of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.interfaces import NetworkFactory
from agents.objectives.advantages import Ends, estimate_advantages, explained_variance, td_errors, whiten


class ActorCritic:
    """An actor and a critic with separate weights."""

    def __init__(self, factory: NetworkFactory) -> None:
        self.actor, self.critic, self.factory = factory.actor(), factory.critic(), factory
        self.policy: nn.Module = self.actor
        self.trained: dict[str, Any] = {"actor": self.actor, "critic": self.critic}
        self.targets: dict[str, nn.Module] = {}

    def state_values(self, rollout: TensorDict) -> Tensor:
        """V(s_0)..V(s_R) without gradient, [B, R + 1]."""
        return self.factory.all_states(self.critic, rollout)


class ActorOnly:
    """An actor without a critic."""

    def __init__(self, factory: NetworkFactory) -> None:
        self.actor = factory.actor()
        self.policy: nn.Module = self.actor
        self.trained: dict[str, Any] = {"actor": self.actor}
        self.targets: dict[str, nn.Module] = {}


def ends_of(rollout: TensorDict) -> Ends:
    """The valid steps of a rollout and the ends of its episodes."""
    return Ends(rollout["mask"], rollout["done"], rollout["terminated"])


@torch.no_grad()
def add_advantages(
    rollout: TensorDict, reward: Tensor, value: Tensor, gamma: float, lmbda: float, whitened: bool
) -> dict[str, float]:
    """Add `state_value`, `td_error`, `raw_advantage`, `advantage` and `value_target`, [B, R] each.

    reward: [B, R]; value: [B, R + 1], of s_0..s_R. `advantage` is the raw one, whitened over the valid steps of the
    rollout if `whitened`. Returns the critic's explained variance before its update.
    """
    ends = ends_of(rollout)
    advantage, target = estimate_advantages(reward, value, ends, gamma, lmbda)
    rollout["state_value"] = value[:, :-1].where(ends.mask, 0.0)
    rollout["td_error"] = td_errors(reward, value, ends, gamma)
    rollout["raw_advantage"] = advantage
    rollout["advantage"] = whiten(advantage, ends.mask) if whitened else advantage
    rollout["value_target"] = target
    return {"explained_variance": float(explained_variance(value[:, :-1], target, ends.mask))}
