"""Deep Q-learning (Mnih et al. 2015) with double estimates (van Hasselt et al. 2016), soft or epsilon-greedy.

With α > 0 it is soft Q-learning (Haarnoja et al. 2017); `objectives/soft_q.py` shows how that relates to the KL
penalty. With α = 0 it is standard DQN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_counts, check_not_negative, check_shares
from agents.interfaces import Loss, NetworkFactory
from agents.objectives.actor_critic import add_environment_reward, ends_of
from agents.objectives.advantages import token_weights
from agents.objectives.soft_q import (
    LOSSES,
    ReplayConfig,
    TargetNetwork,
    action_targets,
    check_discrete,
    soft_value,
    value_of,
)
from textenv.unread import Unread


@dataclass(frozen=True, kw_only=True)
class DQNConfig(ReplayConfig):
    """Settings of DQN."""

    alpha: float | None = None  # weight of the entropy; default: the KL penalty's β, or 0 (epsilon-greedy) without one
    double: bool = True  # the online network chooses the next action, the target network evaluates it
    epsilon_start: float = 1.0  # initial share of random actions; at alpha 0 alone
    epsilon_end: float = 0.05  # final share of random actions
    epsilon_updates: int = 10_000  # optimizer steps from the initial to the final share

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        *ReplayConfig.UNREAD,
        Unread(
            ("epsilon_start", "epsilon_end", "epsilon_updates"),
            lambda job: job.learner.alpha > 0,
            "the policy is softmax(Q / alpha), and actions are epsilon-greedy at alpha=0 alone; leave it out, or "
            "change alpha.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, ("epsilon_updates",))
        check_shares(self, ("epsilon_start", "epsilon_end"))
        if self.alpha is not None:
            check_not_negative(self, ("alpha",))


class QNetworks:
    """An online network, which is also the policy, and its target network."""

    def __init__(self, config: DQNConfig, factory: NetworkFactory, alpha: float) -> None:
        self.online = factory.q_network(alpha)
        self.target = TargetNetwork(self.online, config)
        self.policy: nn.Module = self.online
        self.trained: dict[str, nn.Module] = {"q_network": self.online}
        self.targets: dict[str, nn.Module] = {"q_network": self.target}


class DQN:
    """Regression of action values on targets from a replay buffer."""

    on_policy = False
    ratios = False
    target_kl = 0.0
    step_weights = staticmethod(token_weights)

    def __init__(self, config: DQNConfig, factory: NetworkFactory) -> None:
        check_discrete(factory)
        self.config, self.factory = config, factory
        self.alpha = factory.alpha if config.alpha is None else config.alpha
        self.networks = QNetworks(config, factory, self.alpha)
        self._set_epsilon()

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add `reward` [B, R]. Targets are computed whenever a row is sampled."""
        add_environment_reward(rollout)
        return {}

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """`q_loss`, and the mean value of the actions taken as a diagnostic."""
        config = self.config
        with torch.no_grad():
            target = self.networks.target.network.all_states(batch)
        online = self.networks.online.all_states(batch)
        numbers = self.factory.map_states(self._numbers, [online, target], batch["action"])  # [B, R + 1, 3]
        predicted = numbers[:, :-1, 0].where(batch["mask"], 0.0)  # [B, R]
        value, old = numbers[..., 1].detach(), numbers[:, :-1, 2].detach()  # [B, R + 1], [B, R]
        targets = action_targets(batch["reward"], value, old, ends_of(batch), config.gamma, config.lmbda)
        loss = LOSSES[config.loss_function](predicted, targets, reduction="none")
        yield {"q_loss": loss}, {"q_value": predicted.detach().sum()}

    def _numbers(self, online: Tensor, target: Tensor, action: Tensor) -> Tensor:
        """Q(s, a), and without gradient the state's value and the target network's Q(s, a), [..., 3]."""
        with torch.no_grad():
            value = soft_value(online if self.config.double else target, target, self.alpha)
            old = value_of(action, target)
        return torch.stack([value_of(action, online), value, old], -1)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Update the target network and epsilon."""
        self.networks.target.update(self.networks.online)
        self._set_epsilon()

    def _set_epsilon(self) -> None:
        if self.alpha == 0:
            config = self.config
            progress = min(int(self.networks.target.steps) / config.epsilon_updates, 1.0)
            epsilon = config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)
            self.networks.online.epsilon.fill_(epsilon)
