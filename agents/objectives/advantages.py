"""From rewards and values to advantages: pure functions of tensors and a mask.

Every function reads valid entries only: what stands in padding changes nothing, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate


class Ends(NamedTuple):
    """Which steps are real and which are an episode's last; bool [B, R] each."""

    mask: Tensor  # true counts
    done: Tensor  # nothing after this step belongs to its episode
    terminated: Tensor  # and nothing is worth anything after it: an end of the process, not of a time limit


def response_ends(mask: Tensor) -> Ends:
    """Responses end by themselves, at the last token of each row. mask: bool [B, R], filled from the left."""
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return Ends(mask, last, last)


def token_weights(mask: Tensor) -> Tensor:
    """Every valid step counts the same. mask: bool [B, R]; returns [B, R], summing to 1."""
    return mask / mask.sum().clamp_min(1)


def sequence_weights(mask: Tensor) -> Tensor:
    """Every row counts the same, and in it every valid step. mask: bool [B, R]; returns [B, R], summing to 1."""
    length = mask.sum(1, keepdim=True)  # [B, 1]
    return mask / length.clamp_min(1) / (length > 0).sum().clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where the mask is true; zero where there are none."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp_min(1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 over the mask, and 0 outside it.

    values, mask: [B, R]. The variance is the biased one, so a single valid entry gives 0 and not NaN.
    """
    centered = values - masked_mean(values, mask)
    variance = masked_mean(centered.square(), mask)
    return (centered * (variance + 1e-8).rsqrt()).where(mask, 0.0)


def estimate_advantages(reward: Tensor, value: Tensor, ends: Ends, gamma: float, lmbda: float) -> tuple[Tensor, Tensor]:
    """Advantages and value targets by GAE (Schulman et al. 2016).

    reward: [B, R], the shaped one; value: [B, R + 1], of s_0..s_R. The value after a terminated step is 0; after one
    that is done and not terminated, or the last column, it is bootstrapped. Returns two of [B, R], zero outside the
    mask.
    """
    mask = ends.mask
    advantage, target = generalized_advantage_estimate(
        gamma=gamma,
        lmbda=lmbda,
        state_value=value[:, :-1].where(mask, 0.0)[..., None],
        next_state_value=value[:, 1:].where(mask, 0.0)[..., None],
        reward=reward.where(mask, 0.0)[..., None],
        done=(ends.done | ~mask)[..., None],
        terminated=(ends.terminated | ~mask)[..., None],
    )
    return advantage[..., 0].where(mask, 0.0), target[..., 0].where(mask, 0.0)


def td_errors(reward: Tensor, value: Tensor, ends: Ends, gamma: float) -> Tensor:
    """δ_t = r̃_t + γ V(s_{t+1}) − V(s_t), the value after a terminated step being 0.

    reward: [B, R]; value: [B, R + 1]. Returns [B, R], zero outside the mask.
    """
    next_value = value[:, 1:].where(~ends.terminated, 0.0)
    return (reward + gamma * next_value - value[:, :-1]).where(ends.mask, 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target) over the mask: 1 is perfect, 0 is a constant's worth."""
    error, target = (target - value)[mask], target[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp_min(1e-8)


def leave_one_out(total: Tensor, group: int) -> Tensor:
    """Each response's return, less the mean of its siblings' (RLOO: Kool et al. 2019, Ahmadian et al. 2024).

    A_i = R_i − Σ_{j≠i} R_j / (G − 1): no baseline depends on its own response, so the policy gradient stays unbiased.
    total: float [B], rows of one prompt adjacent, `group` of them. Returns [B].
    """
    grouped = in_groups(total, group)  # [B/G, G]
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()


def group_centered(total: Tensor, group: int) -> Tensor:
    """Each response's return less its group's mean (Dr. GRPO: Liu et al. 2025). Shapes as in `leave_one_out`.

    A deviation to divide by would make a prompt weigh the more, the less its responses differ.
    """
    grouped = in_groups(total, group)  # [B/G, G]
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def group_normalized(total: Tensor, group: int, eps: float = 1e-6) -> Tensor:
    """Each response's return in standard deviations from its group's mean (GRPO: Shao et al. 2024).

    A_i = (R_i − mean R) / (std R + ε), the unbiased deviation. Shapes as in `leave_one_out`.
    """
    deviation = in_groups(total, group).std(1)  # [B/G]
    return group_centered(total, group) / (deviation + eps).repeat_interleave(group)


def in_groups(total: Tensor, group: int) -> Tensor:
    """Returns of responses to one prompt in a row, [B/G, G], as differences from the first of them.

    What compares them does not mind, and where all got the same nothing is left for rounding to make a signal of.
    """
    if group < 2 or len(total) % group:
        raise ValueError(
            f"responses are compared in whole groups of two or more to one prompt; got {len(total)} rows in groups of "
            f"{group}. Make the number of rows a multiple of the environment's group_size."
        )
    grouped = total.view(-1, group)
    return grouped - grouped[:, :1]
