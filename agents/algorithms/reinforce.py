"""REINFORCE with baseline (Williams 1992; Sutton & Barto 2018, §13.4), by TorchRL's ReinforceLoss.

`−(G − V) log π` at every step: the whole return that followed, less what the critic expected, which changes the
gradient's variance and not its mean. Where a rollout ends within an episode, the critic's value stands for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import ReinforceLoss

from agents.config import check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import add_advantages, add_whitened, policy_of
from agents.objectives.advantages import token_weights

WHOLE_RETURNS = 1.0  # GAE's λ: no TD error stands for what really followed


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE."""

    epochs: ClassVar[int] = 1  # no ratio would correct a second pass
    gamma: float = 1.0  # discount per step
    whiten: bool = True  # advantages of a rollout to mean 0 and standard deviation 1

    def __post_init__(self) -> None:
        check_shares(self, ("gamma",))


class Reinforce:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: ReinforceConfig, networks: NetworkFactory) -> None:
        self.config, self.networks = config, networks
        self.actor, self.critic = networks.actor(), networks.critic()
        self.policy = policy_of(self.actor)
        self.trained: dict[str, nn.Module] = {"actor": self.actor, "critic": self.critic}
        self.targets: dict[str, nn.Module] = {}
        self.weights = token_weights
        self.objective = ReinforceLoss(
            self.actor, self.critic, loss_critic_type="l2", functional=False, reduction="none"
        )
        self.objective.loss_mask_key = "mask"

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds `state_value`, `advantage` and `value_target`, all [B, R, 1]."""
        metrics = add_advantages(rollout, self.networks, self.critic, self.config.gamma, WHOLE_RETURNS)
        add_whitened(rollout, self.config.whiten)
        return metrics

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed; no diagnostics."""
        out = self.objective(batch)
        return {"policy_loss": out["loss_actor"], "value_loss": 0.5 * out["loss_value"]}, {}

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Nothing follows the networks, and one pass is all."""
        return False
