"""What the learners without a critic share: the responses to one prompt are each other's baseline."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from agents.interfaces import NetworkFactory
from agents.objectives.advantages import in_groups


def group_of(networks: NetworkFactory) -> int:
    """How many responses each prompt gets. Raises ValueError for fewer than two."""
    if networks.group < 2:
        raise ValueError(
            "this algorithm compares several responses to one prompt, and the environment gives each prompt "
            f"{networks.group}; on text give --env-arg group_size=4, elsewhere choose an algorithm with a critic."
        )
    return networks.group


def returns(rollout: TensorDict, reward_key: str) -> Tensor:
    """Each response's undiscounted return, [B]."""
    return rollout[reward_key].where(rollout["mask"], 0.0).sum(1)


def spread_advantages(rollout: TensorDict, advantage: Tensor) -> None:
    """Adds `raw_advantage` and `advantage` [B, R, 1]: a response's own at each of its tokens. advantage: [B]."""
    spread = (advantage[:, None] * rollout["mask"])[..., None]
    rollout["raw_advantage"], rollout["advantage"] = spread, spread


def group_metrics(total: Tensor, group: int) -> dict[str, float]:
    """How far responses to one prompt differ: where they do not, there is nothing to learn. total: [B]."""
    deviation = in_groups(total, group).std(1, correction=0)
    return {"group_std": float(deviation.mean())}
