"""Shared by the learners of action values: settings, state values, action targets and target networks.

With α > 0 they are maximum-entropy learners: the return includes α times the policy's entropy, and the best policy is
softmax(Q/α). With α = β, the weight of the KL penalty, and no discount, the environment's reward, which holds the
reference's half of the penalty, makes this the KL-regularized objective exactly:

    Σ r_t − α log π(a_t|s_t) = score + β Σ log π_ref(a_t|s_t) − β Σ log π(a_t|s_t) = score − β KL

So these learners learn from `reward`, what the environment pays. On a tree of actions the optimal value is
V*(s) = β log Σ_a π_ref(a|s) exp((score + V*(s'))/β), and tests hold the learners to it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents.config import check_choice, check_counts, check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.advantages import Ends, next_values, packed
from textenv.settings import check_types
from textenv.unread import Unread

LOSSES = {"l2": nn.functional.mse_loss, "smooth_l1": nn.functional.smooth_l1_loss}


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Settings of every learner from a replay buffer."""

    buffer_size: int = 2048  # rows the buffer holds: responses, or steps of another environment
    learning_starts: int = 128  # rows collected before the first update
    gradient_steps: int = 16  # optimizer steps after each rollout
    gamma: float = 1.0  # discount per step
    lmbda: float = 0.95  # mix of one-step targets (0) and whole returns (1), within a row
    target_update_interval: int = 1  # optimizer steps between updates of the target networks
    tau: float = 0.05  # share of the online weights in such an update
    loss_function: str = "l2"  # of TD errors: l2 (square) or smooth_l1 (linear above 1)

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("lmbda",),
            lambda job: not job.on_text,
            "the rows of the buffer are single steps here, so targets are one-step; leave it out.",
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("buffer_size", "learning_starts", "gradient_steps", "target_update_interval"))
        check_shares(self, ("gamma", "lmbda", "tau"))
        check_choice(self, "loss_function", tuple(LOSSES))
        if self.learning_starts > self.buffer_size:
            raise ValueError(
                f"learning_starts must be at most buffer_size, or no update would ever happen; got "
                f"learning_starts={self.learning_starts} and buffer_size={self.buffer_size}."
            )
        if self.tau == 0:
            raise ValueError("tau must be above 0, or the target network would never change; got 0.")


def soft_value(policy_value: Tensor, action_value: Tensor, alpha: float) -> Tensor:
    """Σ_a π(a) (Q(a) − α log π(a)), π = softmax(`policy_value`/α); at α = 0 the value of π's best action.

    With one network for both arguments it is α log Σ exp(Q/α), or the maximum. With the online network first and the
    target network second it is the double estimate (van Hasselt et al. 2016). [..., A] each; returns [...].
    """
    if alpha == 0:
        return action_value.gather(-1, policy_value.argmax(-1, keepdim=True))[..., 0]
    return expected_value((policy_value / alpha).log_softmax(-1), action_value, alpha)


def expected_value(log_prob: Tensor, action_value: Tensor, alpha: float | Tensor) -> Tensor:
    """Σ_a π(a) (Q(a) − α log π(a)). log_prob, action_value: [..., A]; returns [...]."""
    return (log_prob.exp() * (action_value - alpha * log_prob)).sum(-1)


def value_of(action: Tensor, action_value: Tensor) -> Tensor:
    """Q(s, a), [...]. action: [...]; action_value: [..., A]."""
    return action_value.gather(-1, action[..., None])[..., 0]


def action_targets(
    reward: Tensor, value: Tensor, action_value: Tensor, ends: Ends, gamma: float, lmbda: float
) -> Tensor:
    """Targets of Q(s_t, a_t) by Q(λ) with off-policy corrections (Harutyunyan et al. 2016).

    δ_t = r_t + γ V(s_{t+1}) − Q(s_t, a_t), with value 0 after a terminated step; the target is
    Q(s_t, a_t) + Σ_k (γλ)^k δ_{t+k} up to the end of the row or episode. λ = 0 gives r_t + γ V(s_{t+1}). With λ > 0 a
    reward reaches all earlier actions at once, whichever policy chose them; if states form a tree, as texts do, Q* is
    the fixed point for every λ.

    reward: [B, R]; value: [B, R + 1], of s_0..s_R; action_value: [B, R], Q of the actions taken. Returns [B, R].
    """
    error = (reward + gamma * next_values(value, ends) - action_value).where(ends.mask, 0.0)  # [B, R]
    if error.shape[1] == 1:  # single steps from replay: half the time of a small network's targets
        return action_value + error
    steps, order = packed(ends)
    error = error.gather(1, order)
    correction, ahead = torch.zeros_like(error), torch.zeros_like(error[:, 0])
    for step in reversed(range(error.shape[1])):
        ahead = error[:, step] + gamma * lmbda * ahead.where(~steps.done[:, step], 0.0)
        correction[:, step] = ahead
    return action_value + torch.zeros_like(error).scatter(1, order, correction)


class TargetNetwork(nn.Module):
    """A slowly changing copy of an online network: every few steps it moves a share τ toward the online weights."""

    steps: Tensor
    network: Any

    def __init__(self, online: nn.Module, config: ReplayConfig) -> None:
        super().__init__()
        self.interval, self.tau = config.target_update_interval, config.tau
        self.network = copy.deepcopy(online).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # optimizer steps; a checkpoint holds them

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Count one optimizer step of the online network, and follow it if the interval is over."""
        self.steps += 1
        if int(self.steps) % self.interval == 0:
            for own, new in zip(self.network.parameters(), online.parameters(), strict=True):
                own.lerp_(new, self.tau)


def check_discrete(factory: NetworkFactory) -> None:
    """Raise ValueError for continuous actions."""
    if not factory.discrete:
        raise ValueError(
            "this algorithm learns a value for each of a list of actions, and the environment's actions are "
            "continuous (Box); choose an algorithm with a Gaussian policy."
        )
