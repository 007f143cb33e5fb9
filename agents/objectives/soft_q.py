"""What the learners of action values share: the values of states, the targets of actions, and target networks.

At a temperature α above 0 they are maximum-entropy learners: the return counts α times the policy's entropy too, and
the best policy is softmax(Q/α). With α = β, the weight of the KL penalty, and no discount, the environment's half of
that penalty makes this the KL-regularized objective exactly:

    Σ r_t − α log π(a_t|s_t) = score + β Σ log π_ref(a_t|s_t) − β Σ log π(a_t|s_t) = score − β KL

so these learners read `reward`, what the environment paid, and not the shaped reward. On a tree of actions the best
value is V*(s) = β log Σ_a π_ref(a|s) exp((score + V*(s'))/β), and tests hold the learners to it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import check_choice, check_counts, check_shares
from agents.interfaces import NetworkFactory
from agents.objectives.advantages import Ends

LOSSES = {"l2": nn.functional.mse_loss, "smooth_l1": nn.functional.smooth_l1_loss}


def soft_value(policy_value: Tensor, action_value: Tensor, temperature: float) -> Tensor:
    """Σ_a π(a) (Q(a) − α log π(a)), π = softmax(`policy_value`/α); at α = 0 the value of π's best action.

    Of one network, `policy_value` being `action_value`, it is α log Σ exp(Q/α), or the maximum; of two, the online
    and the target network, the double estimate (van Hasselt et al. 2016). [..., A] each; returns [...].
    """
    if temperature == 0:
        return action_value.gather(-1, policy_value.argmax(-1, keepdim=True))[..., 0]
    return expected_value((policy_value / temperature).log_softmax(-1), action_value, temperature)


def expected_value(log_prob: Tensor, action_value: Tensor, temperature: float | Tensor) -> Tensor:
    """Σ_a π(a) (Q(a) − α log π(a)) of a policy's log-probabilities. [..., A] each; returns [...]."""
    return (log_prob.exp() * (action_value - temperature * log_prob)).sum(-1)


def chosen(action_value: Tensor, action: Tensor) -> Tensor:
    """Q(s_t, a_t). action_value: [B, R, A]; action: [B, R]."""
    return action_value.gather(-1, action[..., None])[..., 0]


def action_targets(
    reward: Tensor, value: Tensor, action_value: Tensor, ends: Ends, gamma: float, lmbda: float
) -> Tensor:
    """What Q(s_t, a_t) should be, by Q(λ) with off-policy corrections (Harutyunyan et al. 2016).

    δ_t = r_t + γ V(s_{t+1}) − Q(s_t, a_t), the value after a terminated step being 0, and the target is
    Q(s_t, a_t) + Σ_k (γλ)^k δ_{t+k} as far as the row and its episode go. λ = 0 is r_t + γ V(s_{t+1}). Above, a reward
    reaches all earlier actions at once, whoever chose them; where states form a tree, as texts do, Q* is the fixed
    point for every λ.

    reward: [B, R]; value: [B, R + 1], of s_0..s_R; action_value: [B, R], Q of the actions taken. Returns [B, R].
    """
    next_value = value[:, 1:].where(~ends.terminated, 0.0)
    error = (reward + gamma * next_value - action_value).where(ends.mask, 0.0)  # [B, R]
    total, ahead = error.clone(), torch.zeros_like(error[:, 0])
    for step in reversed(range(error.shape[1])):
        ahead = error[:, step] + gamma * lmbda * ahead.where(~ends.done[:, step], 0.0)
        total[:, step] = ahead
    return action_value + total


def read(module: Any, batch: TensorDict) -> Tensor:
    """What the network inside a TensorDictModule says of every action at s_0..s_R. Returns [B, R + 1, A]."""
    return module.module.all_states(batch)


class Target(nn.Module):
    """A network that follows a trained one: every so many steps it takes a share of its weights."""

    steps: Tensor

    def __init__(self, online: nn.Module, every: int, tau: float) -> None:
        super().__init__()
        self.every, self.tau = every, tau
        self.network = copy.deepcopy(online).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of the optimizer; kept in checkpoints

    @torch.no_grad()
    def follow(self, online: nn.Module) -> None:
        """The online network has made a step."""
        self.steps += 1
        if int(self.steps) % self.every == 0:
            for own, new in zip(self.network.parameters(), online.parameters(), strict=True):
                own.lerp_(new, self.tau)


def check_discrete(networks: NetworkFactory) -> None:
    """Refuses actions that are no list to choose from."""
    if not networks.discrete:
        raise ValueError(
            "this algorithm learns a value for each of a list of actions, and the environment's actions are "
            "continuous (Box); choose an algorithm with a Gaussian policy."
        )


def check_replay(config: Any) -> None:
    """Refuses settings that no learner from a replay buffer can take."""
    check_counts(config, ("buffer_size", "learning_starts", "gradient_steps", "target_update_interval"))
    check_shares(config, ("gamma", "lmbda", "tau"))
    check_choice(config, "loss_function", tuple(LOSSES))
    if config.learning_starts > config.buffer_size:
        raise ValueError(
            f"learning_starts must be at most buffer_size, or no update would ever come; got "
            f"learning_starts={config.learning_starts} and buffer_size={config.buffer_size}."
        )
    if config.tau == 0:
        raise ValueError("tau must be above 0, or the target network would never follow; got 0.")
