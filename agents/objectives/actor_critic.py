"""Shared by the learners: their networks, and a rollout's rewards, values, advantages and value targets."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Distribution

from agents.interfaces import NetworkFactory
from agents.objectives.advantages import Ends, estimate_advantages, explained_variance, td_errors, whiten
from textenv.kl import environment_reward, penalized_reward


class Categorical(torch.distributions.Categorical):
    """PyTorch's Categorical, normalized by `log_softmax`: half the time on a vocabulary of 50k.

    logits: finite, [..., A]. It does not support `expand`, and takes actions of its batch shape only.
    """

    def __init__(self, logits: Tensor) -> None:
        normalized: Any = logits.log_softmax(-1)
        self.logits = self._param = normalized
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of actions [...], one per distribution; returns [...]."""
        return self.logits.gather(-1, value[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """−Σ π log π in nats, [...]."""
        return -(self.logits.exp() * self.logits).sum(-1)


class ActorCritic:
    """An actor and a critic with separate weights."""

    def __init__(self, factory: NetworkFactory) -> None:
        self.actor, self.factory = factory.actor(), factory
        self.policy: nn.Module = self.actor
        self.targets: dict[str, nn.Module] = {}

    @cached_property
    def critic(self) -> Any:
        """Built when it is first asked for: acting needs none."""
        return self.factory.critic()

    @property
    def trained(self) -> dict[str, Any]:
        """Both, by name."""
        return {"actor": self.actor, "critic": self.critic}

    def state_values(self, rollout: TensorDict) -> Tensor:
        """V(s_0)..V(s_R) without gradient, [B, R + 1]."""
        return self.factory.state_values(self.critic, rollout)


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


def add_penalized_reward(rollout: TensorDict, kl_loss: str = "none") -> None:
    """Add `reward` [B, R], r̃_t = score_t − β·KL_t: what on-policy learners optimize.

    The score alone if the KL is in the loss (`kl_loss` names its estimator), or if there is no penalty. Where there is
    one, `penalty` [B, R] is β·KL_t.
    """
    reward = rollout["step_score"]
    if "kl" in rollout and kl_loss == "none":
        coef = rollout["kl_coef"][:, None]
        rollout["penalty"] = coef * rollout["kl"]
        reward = penalized_reward(reward, rollout["kl"], coef)
    rollout["reward"] = reward


def add_environment_reward(rollout: TensorDict) -> None:
    """Add `reward` [B, R], r_t = score_t + β log π_ref(a_t | s_t): what the environment pays.

    A maximum-entropy learner adds the policy's half of the penalty itself, as α times its entropy.
    """
    reward = rollout["step_score"]
    if "reference_log_prob" in rollout:
        reward = environment_reward(reward, rollout["reference_log_prob"], rollout["kl_coef"][:, None])
    rollout["reward"] = reward


@torch.no_grad()
def add_advantages(rollout: TensorDict, value: Tensor, gamma: float, lmbda: float, whitened: bool) -> dict[str, float]:
    """Add `state_value`, `td_error`, `raw_advantage`, `advantage` and `value_target`, [B, R] each.

    value: [B, R + 1], of s_0..s_R. `advantage` is the raw one, whitened over the valid steps of the rollout if
    `whitened`. Returns the critic's explained variance before its update.
    """
    ends, reward = ends_of(rollout), rollout["reward"]
    advantage, target = estimate_advantages(reward, value, ends, gamma, lmbda)
    rollout["state_value"] = value[:, :-1].where(ends.mask, 0.0)
    rollout["td_error"] = td_errors(reward, value, ends, gamma)
    rollout["raw_advantage"] = advantage
    rollout["advantage"] = whiten(advantage, ends.mask) if whitened else advantage
    rollout["value_target"] = target
    return {"explained_variance": float(explained_variance(value[:, :-1], target, ends.mask))}
