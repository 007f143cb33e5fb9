"""Shared by the learners without a critic: responses to one prompt are each other's baseline."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from agents.interfaces import NetworkFactory
from agents.objectives.advantages import in_groups


def check_group_size(factory: NetworkFactory) -> int:
    """Rows that start from the same state. Raises ValueError for fewer than two."""
    if factory.group_size is None:
        raise ValueError(
            "this algorithm compares several episodes from one starting state, which this environment does not offer; "
            "choose an algorithm with a critic or a replay buffer."
        )
    if factory.group_size < 2:
        raise ValueError(
            "this algorithm compares several responses to one prompt, and the environment gives each prompt "
            f"{factory.group_size}; give --env.group-size 4."
        )
    return factory.group_size


def undiscounted_returns(reward: Tensor, mask: Tensor) -> Tensor:
    """Sum of each response's rewards. reward, mask: [B, R]; returns [B]."""
    return reward.where(mask, 0.0).sum(1)


def add_response_advantages(rollout: TensorDict, advantage: Tensor) -> None:
    """Add `raw_advantage` and `advantage` [B, R]: each token gets its response's. advantage: [B]."""
    per_token = advantage[:, None].where(rollout["mask"], 0.0)  # [B, R]
    rollout["raw_advantage"], rollout["advantage"] = per_token, per_token


def group_metrics(returns: Tensor, group_size: int) -> dict[str, float]:
    """Mean standard deviation of returns within a group; at 0 there is no signal. returns: [B]."""
    deviation = in_groups(returns, group_size).std(1, correction=0)
    return {"group_std": float(deviation.mean())}
