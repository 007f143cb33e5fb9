"""Soft actor-critic (Haarnoja et al. 2018) for discrete actions (Christodoulou 2019).

`objectives/soft_q.py` shows how α relates to the KL penalty. Both losses are exact sums over all actions:

    policy loss = Σ_a π(a|s) (α log π(a|s) − min_i Q_i(s, a))        Q loss = Σ_i (Q_i(s, a) − target)²
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_shares
from agents.interfaces import Loss, NetworkFactory
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
    ratios = False
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: SACConfig, factory: NetworkFactory) -> None:
        check_discrete(factory)
        self.config, self.factory, self.fixed_alpha = config, factory, config.alpha or factory.alpha
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

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`q_loss`, `policy_loss` and, if α is learned, `alpha_loss`; the value of the actions taken and α."""
        action, mask, targets = batch["action"], batch["mask"], self._targets(batch)
        measure = LOSSES[self.config.loss_function]
        values, predicted = [], []
        for network in self.networks.online:
            values.append(network.all_states(batch))
            q_value = self.factory.map_states(lambda values, action: value_of(action, values), values[-1:], action)
            predicted.append(q_value[:, :-1].where(mask, 0.0))  # [B, R]
            yield {"q_loss": measure(predicted[-1], targets, reduction="none")}, {}
        terms, diagnostics = self._policy_loss(batch, values)
        yield terms, diagnostics | {"q_value": torch.minimum(*predicted).detach().sum()}

    def _policy_loss(self, batch: TensorDict, values: list[Any]) -> Loss:
        """values: what the online networks say of all actions."""
        mask, learned = batch["mask"], self.networks.learned_alpha
        logits = self.networks.actor.all_states(batch)
        numbers = self.factory.map_states(self._policy_numbers, [logits, *values])[:, :-1]  # [B, R, K]
        terms = {"policy_loss": -numbers[..., 0]}
        if learned is None:
            return terms, {}
        excess = numbers[..., 1].detach().where(mask, 0.0)
        return terms | {"alpha_loss": learned.log * excess}, {"alpha": learned.log.detach().exp() * mask.sum()}

    def _policy_numbers(self, logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The policy's value by the lower of two action values, [..., 1]; if α is learned also its entropy in excess of
        the target, [..., 2].
        """
        log_prob = logits.log_softmax(-1)
        value = expected_value(log_prob, torch.minimum(first, second).detach(), self.alpha)
        if self.networks.learned_alpha is None:
            return value[..., None]
        excess = -(log_prob.exp() * log_prob).sum(-1) - self.config.target_entropy * math.log(logits.shape[-1])
        return torch.stack([value, excess], -1)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Update the target networks."""
        for target, online in zip(self.networks.target, self.networks.online, strict=True):
            target.update(online)

    @torch.no_grad()
    def _targets(self, batch: TensorDict) -> Tensor:
        """Targets of both critics, [B, R]."""
        networks = [self.networks.actor, *(target.network for target in self.networks.target)]
        values = [network.all_states(batch) for network in networks]
        value, old = self.factory.map_states(self._target_numbers, values, batch["action"]).unbind(-1)  # [B, R + 1]
        config = self.config
        return action_targets(batch["reward"], value, old[:, :-1], ends_of(batch), config.gamma, config.lmbda)

    def _target_numbers(self, logits: Tensor, first: Tensor, second: Tensor, action: Tensor) -> Tensor:
        """The state's value, and Q(s, a), by the lower of two action values, [..., 2]."""
        lowest = torch.minimum(first, second)
        return torch.stack([expected_value(logits.log_softmax(-1), lowest, self.alpha), value_of(action, lowest)], -1)
