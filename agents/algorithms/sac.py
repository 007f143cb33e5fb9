"""Soft actor-critic (Haarnoja et al. 2018) for discrete actions (Christodoulou 2019).

`objectives/soft_q.py` shows how α relates to the KL penalty. Both losses are exact sums over all actions:

    policy loss = Σ_a π(a|s) (α log π(a|s) − min_i Q_i(s, a))        Q loss = Σ_i (Q_i(s, a) − target)²
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import add_environment_reward, ends_of
from agents.objectives.advantages import token_weights
from agents.objectives.soft_q import (
    LOSSES,
    ReplayConfig,
    TargetNetwork,
    action_targets,
    check_discrete,
    expected_value,
    value_of,
)
from textenv.unread import Unread


@dataclass(frozen=True, kw_only=True)
class SACConfig(ReplayConfig):
    """Settings of SAC."""

    alpha: float | None = None  # weight of the entropy; default: the KL penalty's β, or learned without one
    target_entropy: float = 0.5  # a learned alpha holds the entropy at this share of the largest possible

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        *ReplayConfig.UNREAD,
        Unread(
            ("target_entropy",),
            lambda job: "alpha" not in job.trained,
            "alpha is fixed, by the setting or by the environment's kl_coef, and not learned; leave it out.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, ("target_entropy",))
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(
                f"alpha must be above 0, got {self.alpha}; leave it out to learn it, or to take the KL penalty's β."
            )


class LearnedAlpha(nn.Module):
    """α, trained through its logarithm."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), device=device))


class SACNetworks:
    """An actor, two action-value networks with their target networks, and α if it is learned."""

    def __init__(self, config: SACConfig, factory: NetworkFactory, alpha: float) -> None:
        """alpha: its fixed value, or 0 to learn it."""
        self.actor = factory.actor()
        self.learned_alpha = None if alpha > 0 else LearnedAlpha(next(self.actor.parameters()).device)
        self.online = [factory.q_network(alpha) for _ in range(2)]
        self.target = [TargetNetwork(network, config) for network in self.online]
        self.policy: nn.Module = self.actor
        names = [f"q_network_{number}" for number in (1, 2)]
        self.trained: dict[str, nn.Module] = {"actor": self.actor, **dict(zip(names, self.online, strict=True))}
        if self.learned_alpha is not None:
            self.trained["alpha"] = self.learned_alpha
        self.targets: dict[str, nn.Module] = dict(zip(names, self.target, strict=True))


class SAC:
    """An actor that maximizes action values and entropy, and two critics fitted to targets from a replay buffer."""

    on_policy = False
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: SACConfig, factory: NetworkFactory) -> None:
        check_discrete(factory)
        self.config, self.fixed_alpha = config, config.alpha or factory.alpha
        self.networks = SACNetworks(config, factory, self.fixed_alpha)

    @property
    def alpha(self) -> Tensor | float:
        """α, without gradient."""
        learned = self.networks.learned_alpha
        return self.fixed_alpha if learned is None else learned.log.detach().exp()

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward` [B, R]. Targets are computed whenever a row is sampled."""
        add_environment_reward(rollout)
        return {}

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`policy_loss`, `q_loss` and, if α is learned, `alpha_loss`; the value of the actions taken and α."""
        action, mask = batch["action"], batch["mask"]
        log_prob = self.networks.actor.all_states(batch).log_softmax(-1)  # [B, R + 1, A]
        action_values = [network.all_states(batch)[:, :-1] for network in self.networks.online]  # [B, R, A] each
        targets = self._targets(batch, log_prob.detach())  # [B, R]
        predicted = [value_of(action, values).where(mask, 0.0) for values in action_values]  # [B, R] each
        measure = LOSSES[self.config.loss_function]
        q_losses = [measure(values, targets, reduction="none") for values in predicted]
        log_prob = log_prob[:, :-1]  # [B, R, A]
        terms = {
            "policy_loss": -expected_value(log_prob, torch.minimum(*action_values).detach(), self.alpha),
            "q_loss": sum(q_losses, torch.zeros_like(targets)),
        }
        diagnostics = {"q_value": torch.minimum(*predicted).detach().sum()}
        if (learned := self.networks.learned_alpha) is not None:
            entropy = -(log_prob.exp() * log_prob).sum(-1).detach()  # [B, R]
            excess = entropy - self.config.target_entropy * math.log(log_prob.shape[-1])
            terms["alpha_loss"] = learned.log * excess.where(mask, 0.0)
            diagnostics["alpha"] = learned.log.detach().exp() * mask.sum()
        return terms, diagnostics

    def after_step(self, metrics: dict[str, float]) -> None:
        """Update the target networks."""
        for target, online in zip(self.networks.target, self.networks.online, strict=True):
            target.update(online)

    @torch.no_grad()
    def _targets(self, batch: TensorDict, log_prob: Tensor) -> Tensor:
        """Targets of both critics, [B, R]. log_prob: the actor's at s_0..s_R, [B, R + 1, A]."""
        lowest = torch.minimum(*(target.network.all_states(batch) for target in self.networks.target))
        value = expected_value(log_prob, lowest, self.alpha)  # [B, R + 1]
        old = value_of(batch["action"], lowest[:, :-1])  # [B, R]
        return action_targets(batch["reward"], value, old, ends_of(batch), self.config.gamma, self.config.lmbda)
