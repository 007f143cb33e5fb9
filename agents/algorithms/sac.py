"""Soft actor-critic (Haarnoja et al. 2018) for discrete actions (Christodoulou 2019).

See objectives/soft_q.py for what its temperature has to do with the KL penalty. Both losses are exact sums over all
actions:

    policy loss = Σ_a π(a|s) (α log π(a|s) − min_i Q_i(s, a))        Q loss = Σ_i (Q_i(s, a) − target)²
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.actor_critic import ends_of, policy_of
from agents.objectives.advantages import token_weights
from agents.objectives.soft_q import (
    LOSSES,
    Target,
    action_targets,
    check_discrete,
    check_replay,
    chosen,
    expected_value,
    read,
)


@dataclass(frozen=True, kw_only=True)
class SACConfig:
    """Settings of SAC."""

    buffer_size: int = 2048  # rows that are remembered: responses, or steps of another environment
    learning_starts: int = 128  # rows before the first update
    gradient_steps: int = 16  # optimizer steps after each rollout
    temperature: float | None = None  # α; default the KL penalty's β, or learned where there is no penalty
    target_entropy: float = 0.5  # share of the largest possible entropy that a learned temperature keeps to
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # mix of one-step targets (0) and whole returns (1), within a row
    target_update_interval: int = 1  # optimizer steps between updates of the target networks
    tau: float = 0.05  # share of the online weights that they take then
    loss_function: str = "l2"  # of TD errors: l2, their square, or smooth_l1, linear where they are above 1

    def __post_init__(self) -> None:
        check_replay(self)
        check_shares(self, ("target_entropy",))
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; leave it out to have it learned, or to take "
                "the KL penalty's β."
            )


class Temperature(nn.Module):
    """A learned temperature, by its logarithm."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), device=device))


class SAC:
    """The three verbs of an algorithm."""

    on_policy = False

    def __init__(self, config: SACConfig, networks: NetworkFactory) -> None:
        check_discrete(networks)
        self.config = config
        fixed = config.temperature or networks.temperature
        self.actor = networks.actor()
        self.policy = policy_of(self.actor)
        self.fixed = fixed
        self.learned = None if fixed > 0 else Temperature(next(self.actor.parameters()).device)
        self.q_networks = [networks.q_network(fixed) for _ in range(2)]
        self.followers = [Target(network, config.target_update_interval, config.tau) for network in self.q_networks]
        names = [f"q_network_{number}" for number in (1, 2)]
        self.trained: dict[str, nn.Module] = {"actor": self.actor, **dict(zip(names, self.q_networks, strict=True))}
        if self.learned is not None:
            self.trained["temperature"] = self.learned
        self.targets: dict[str, nn.Module] = dict(zip(names, self.followers, strict=True))
        self.weights = token_weights

    @property
    def temperature(self) -> Tensor | float:
        """α as a constant."""
        return self.fixed if self.learned is None else self.learned.log.detach().exp()

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Nothing: targets are made anew whenever a row is drawn."""
        return {}

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        mask = batch["mask"]
        log_prob = read(self.actor[0], batch).log_softmax(-1)  # [B, R + 1, A]
        q = [read(network, batch)[:, :-1] for network in self.q_networks]  # [B, R, A] each
        wanted = self._targets(batch, log_prob.detach())  # [B, R]
        found = [chosen(one, batch["action"]) for one in q]  # [B, R] each
        measure = LOSSES[self.config.loss_function]
        now = log_prob[:, :-1]  # [B, R, A]
        terms = {
            "policy_loss": -expected_value(now, torch.minimum(*q).detach(), self.temperature),
            "q_loss": sum((measure(one, wanted, reduction="none") for one in found), torch.zeros_like(wanted)),
        }
        diagnostics = {"q_value": torch.minimum(*found).detach().where(mask, 0.0).sum()}
        if self.learned is not None:
            entropy = -(now.exp() * now).sum(-1).detach()  # [B, R]
            excess = entropy - self.config.target_entropy * math.log(now.shape[-1])
            terms["temperature_loss"] = self.learned.log * excess
            diagnostics["temperature"] = self.learned.log.detach().exp() * mask.sum()
        return terms, diagnostics

    def after_step(self, metrics: dict[str, float]) -> bool:
        """The target networks follow."""
        for follower, network in zip(self.followers, self.q_networks, strict=True):
            follower.follow(network)
        return False

    @torch.no_grad()
    def _targets(self, batch: TensorDict, log_prob: Tensor) -> Tensor:
        """log_prob: [B, R + 1, A]. Returns [B, R]."""
        lowest = torch.minimum(*(read(follower.network, batch) for follower in self.followers))  # [B, R + 1, A]
        value = expected_value(log_prob, lowest, self.temperature)  # [B, R + 1]
        old = chosen(lowest[:, :-1], batch["action"])
        return action_targets(batch["reward"], value, old, ends_of(batch), self.config.gamma, self.config.lmbda)
