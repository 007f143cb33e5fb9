"""From rewards and values to advantages: pure functions of tensors and a mask.

Every function reads valid entries only: what stands in padding changes nothing, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where the mask is true; zero where there are none."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp_min(1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 over the mask, and 0 outside it.

    values, mask: [B, R]. The variance is the biased one, so a single valid entry gives 0 and not NaN.
    """
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred.square(), mask)
    return (centred * (variance + 1e-8).rsqrt()).where(mask, 0.0)


def estimate_advantages(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lmbda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets by GAE (Schulman et al. 2016), for responses that end by themselves.

    reward: [B, R], the shaped one; value: [B, R + 1], of s_0..s_R; mask: bool [B, R]. The last valid token
    ends its episode, and the value beyond it is 0. Returns two of [B, R], zero outside the mask.
    """
    state_value = value[:, :-1].where(mask, 0.0)
    next_value = value[:, 1:].where(mask, 0.0)
    done = ~mask | ~torch.nn.functional.pad(mask[:, 1:], (0, 1))  # [B, R], true from the last token on
    advantage, target = generalized_advantage_estimate(
        gamma=gamma,
        lmbda=lmbda,
        state_value=state_value[..., None],
        next_state_value=next_value[..., None],
        reward=reward.where(mask, 0.0)[..., None],
        done=done[..., None],
        terminated=done[..., None],
    )
    return advantage[..., 0].where(mask, 0.0), target[..., 0].where(mask, 0.0)


def td_errors(reward: Tensor, value: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """δ_t = r̃_t + γ V(s_{t+1}) − V(s_t), the value beyond the last token being 0.

    reward: [B, R]; value: [B, R + 1]; mask: bool [B, R]. Returns [B, R], zero outside the mask.
    """
    goes_on = torch.nn.functional.pad(mask[:, 1:], (0, 1))  # [B, R], false at the last token
    next_value = value[:, 1:].where(goes_on, 0.0)
    return (reward + gamma * next_value - value[:, :-1]).where(mask, 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target) over the mask: 1 is perfect, 0 is a constant's worth."""
    error, target = (target - value)[mask], target[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp_min(1e-8)
