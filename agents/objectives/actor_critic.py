"""What the learners with an actor and a critic share: values, advantages and value targets of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Distribution

from agents.interfaces import NetworkFactory
from agents.objectives.advantages import Ends, estimate_advantages, explained_variance, td_errors, whiten


def ends_of(rollout: TensorDict) -> Ends:
    """Which steps of a rollout are real, and which end an episode."""
    return Ends(rollout["mask"], rollout["done"], rollout["terminated"])


def policy_of(actor: ProbabilisticTensorDictSequential) -> nn.Module:
    """The network inside an actor, which plays."""
    return inside(actor[0])


def output_of(module: Any, batch: TensorDict) -> Any:
    """What the network inside a TensorDictModule makes of a batch."""
    return inside(module)(*(batch[key] for key in module.in_keys))


def distribution_of(actor: Any, batch: TensorDict) -> Distribution:
    """What `actor.get_dist(batch)` gives, without its bookkeeping, which costs as much as a small network."""
    network, head = actor[0], actor[-1]
    outputs = output_of(network, batch)
    named = dict(zip(head.in_keys, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    return head.distribution_class(**named, **head.distribution_kwargs)


def add_whitened(rollout: TensorDict, on: bool) -> None:
    """Adds `advantage` [B, R, 1]: the raw one, whitened over the valid steps of the rollout where that is on."""
    advantage, mask = rollout["raw_advantage"], rollout["mask"][..., None]
    rollout["advantage"] = whiten(advantage, mask) if on else advantage


def inside(module: Any) -> nn.Module:
    """The network inside a TensorDictModule."""
    return module.module


@torch.no_grad()
def add_advantages(
    rollout: TensorDict,
    networks: NetworkFactory,
    critic: TensorDictModule,
    gamma: float,
    lmbda: float,
    reward_key: str = "shaped_reward",
) -> dict[str, float]:
    """Adds `state_value`, `td_error`, `raw_advantage` and `value_target`, all [B, R, 1].

    Returns what the critic knew before it was updated.
    """
    ends, reward = ends_of(rollout), rollout[reward_key]
    value = networks.all_states(inside(critic), rollout)[..., 0]  # [B, R + 1]
    advantage, target = estimate_advantages(reward, value, ends, gamma, lmbda)
    rollout["state_value"] = value[:, :-1].where(ends.mask, 0.0)[..., None]
    rollout["td_error"] = td_errors(reward, value, ends, gamma)[..., None]
    rollout["raw_advantage"] = advantage[..., None]
    rollout["value_target"] = target[..., None]
    return {"explained_variance": float(explained_variance(value[:, :-1], target, ends.mask))}
