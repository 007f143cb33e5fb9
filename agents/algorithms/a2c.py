"""Advantage actor-critic (Mnih et al. 2016), one pass over each rollout, by TorchRL's A2CLoss.

`−Â log π` and `½ (V − target)²` at every step, with advantages by GAE. The gradient is PPO's at a ratio of 1, which a
minibatch of the whole rollout keeps; smaller ones take more steps, the later ones a little off the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import A2CLoss

from agents.config import check_not_negative, check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import add_advantages, add_whitened, policy_of
from agents.objectives.advantages import token_weights


@dataclass(frozen=True, kw_only=True)
class A2CConfig:
    """Settings of A2C."""

    epochs: ClassVar[int] = 1  # no ratio would correct a second pass
    entropy_coef: float = 0.0  # weight of an entropy bonus; 0 saves its cost
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # GAE's mix of TD errors (0) and whole returns (1)
    whiten: bool = True  # advantages of a rollout to mean 0 and standard deviation 1

    def __post_init__(self) -> None:
        check_not_negative(self, ("entropy_coef",))
        check_shares(self, ("gamma", "lmbda"))


class A2C:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: A2CConfig, networks: NetworkFactory) -> None:
        self.config, self.networks = config, networks
        self.actor, self.critic = networks.actor(), networks.critic()
        self.policy = policy_of(self.actor)
        self.trained: dict[str, nn.Module] = {"actor": self.actor, "critic": self.critic}
        self.targets: dict[str, nn.Module] = {}
        self.weights = token_weights
        self.objective = A2CLoss(
            self.actor,
            self.critic,
            critic_coeff=0.5,  # the ½ of the value loss; the networks share no weight, so it needs no other
            loss_critic_type="l2",
            entropy_bonus=config.entropy_coef > 0,
            entropy_coeff=config.entropy_coef,
            functional=False,
            reduction="none",
        )
        self.objective.loss_mask_key = "mask"

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds `state_value`, `advantage` and `value_target`, all [B, R, 1]."""
        metrics = add_advantages(rollout, self.networks, self.critic, self.config.gamma, self.config.lmbda)
        add_whitened(rollout, self.config.whiten)
        return metrics

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed; no diagnostics."""
        out = self.objective(batch)
        terms = {"policy_loss": out["loss_objective"], "value_loss": out["loss_critic"]}
        if self.config.entropy_coef > 0:
            terms["entropy_loss"] = out["loss_entropy"]
        return terms, {}

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Nothing follows the networks, and one pass is all."""
        return False
