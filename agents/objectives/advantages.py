"""From rewards and values to advantages: pure functions of tensors and a mask.

Only valid entries count: the content of padding changes no result, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate


class Ends(NamedTuple):
    """Valid steps and the ends of episodes; bool [B, R] each.

    Valid steps need not be adjacent: tokens of the environment may stand between two tokens of the policy, and a reset
    between two episodes.
    """

    mask: Tensor  # true = a step of the policy
    done: Tensor  # the episode's last step
    terminated: Tensor  # done, and the value after it is 0; false at a time limit


def response_ends(mask: Tensor) -> Ends:
    """Each response terminates at its last generated token. mask: bool [B, R]."""
    remaining = mask.flip(1).cumsum(1).flip(1)  # [B, R], generated tokens from here on
    last = mask & (remaining == 1)
    return Ends(mask, last, last)


def next_values(value: Tensor, ends: Ends) -> Tensor:
    """V(s_{t+1}) as each valid step sees it: 0 after termination, else the value at the policy's next state.

    Within an episode that is the state before its next valid step; after a time limit it is the state reached.
    value: [B, R + 1], of s_0..s_R. Returns [B, R].
    """
    steps = ends.mask.shape[1]
    if steps == 1:  # single steps from replay: nothing to skip
        return value[:, 1:].where(~ends.terminated, 0.0)
    column = torch.arange(steps, device=value.device).expand_as(ends.mask)
    valid = torch.where(ends.mask, column, steps)
    following = valid.flip(1).cummin(1).values.flip(1)  # [B, R], the first valid step from here on
    following = torch.nn.functional.pad(following[:, 1:], (0, 1), value=steps)
    reached = torch.where(ends.done, column + 1, following)
    return value.gather(1, reached).where(~ends.terminated, 0.0)


def packed(ends: Ends) -> tuple[Ends, Tensor]:
    """The valid steps moved to the left of each row, and the columns they came from, int64 [B, R]."""
    order = (~ends.mask).long().argsort(dim=1, stable=True)
    return Ends(*(flags.gather(1, order) for flags in ends)), order


def token_weights(mask: Tensor) -> Tensor:
    """Equal weight for every valid step. mask: bool [B, R]; returns [B, R], summing to 1."""
    return mask / mask.sum().clamp_min(1)


def sequence_weights(mask: Tensor) -> Tensor:
    """Equal weight for every row, shared by its valid steps. mask: bool [B, R]; returns [B, R], summing to 1."""
    length = mask.sum(1, keepdim=True)  # [B, 1]
    return mask / length.clamp_min(1) / (length > 0).sum().clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where the mask is true; 0 if there are none."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp_min(1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values standardized to mean 0 and standard deviation 1 over the mask; 0 outside it.

    values, mask: [B, R]. The variance is the biased one, so a single valid entry gives 0 and not NaN.
    """
    centered = values - masked_mean(values, mask)
    variance = masked_mean(centered.square(), mask)
    return (centered * (variance + 1e-8).rsqrt()).where(mask, 0.0)


def estimate_advantages(reward: Tensor, value: Tensor, ends: Ends, gamma: float, lmbda: float) -> tuple[Tensor, Tensor]:
    """Advantages and value targets by GAE (Schulman et al. 2016).

    reward: [B, R]; value: [B, R + 1], of s_0..s_R. Steps outside the mask are skipped: the step before them is followed
    by the step after them. The value after a terminated step is 0; after a time limit, or a rollout's last step, it is
    bootstrapped. Returns two [B, R], zero outside the mask.
    """
    steps, order = packed(ends)
    state_value, reward = value[:, :-1].gather(1, order), reward.gather(1, order)
    next_value = next_values(value, ends).gather(1, order)
    advantage, target = generalized_advantage_estimate(
        gamma=gamma,
        lmbda=lmbda,
        state_value=state_value.where(steps.mask, 0.0)[..., None],
        next_state_value=next_value.where(steps.mask, 0.0)[..., None],
        reward=reward.where(steps.mask, 0.0)[..., None],
        done=(steps.done | ~steps.mask)[..., None],
        terminated=(steps.terminated | ~steps.mask)[..., None],
    )
    unpacked = [torch.zeros_like(value[:, :-1]).scatter(1, order, part[..., 0]) for part in (advantage, target)]
    return unpacked[0].where(ends.mask, 0.0), unpacked[1].where(ends.mask, 0.0)


def td_errors(reward: Tensor, value: Tensor, ends: Ends, gamma: float) -> Tensor:
    """δ_t = r̃_t + γ V(s_{t+1}) − V(s_t), the value after a terminated step being 0.

    reward: [B, R]; value: [B, R + 1]. Returns [B, R], zero outside the mask.
    """
    return (reward + gamma * next_values(value, ends) - value[:, :-1]).where(ends.mask, 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target) over the mask: 1 is perfect, 0 is a constant's worth."""
    error, target = (target - value)[mask], target[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp_min(1e-8)


def leave_one_out(total: Tensor, group: int) -> Tensor:
    """Each response's return minus the mean of its siblings' (RLOO: Kool et al. 2019, Ahmadian et al. 2024).

    A_i = R_i − Σ_{j≠i} R_j / (G − 1). No baseline depends on its own response, so the policy gradient is unbiased.
    total: float [B], the `group` responses to a prompt adjacent. Returns [B].
    """
    grouped = in_groups(total, group)  # [B/G, G]
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()


def group_centered(total: Tensor, group: int) -> Tensor:
    """Each response's return minus its group's mean (Dr. GRPO: Liu et al. 2025). Shapes as in `leave_one_out`.

    Dividing by the standard deviation would give more weight to prompts whose responses differ less.
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
    """Returns by prompt, [B/G, G], as differences from the first response's.

    Comparisons within a group do not change, and equal returns become exact zeros instead of rounding noise.
    """
    if group < 2 or len(total) % group:
        raise ValueError(
            f"responses are compared in whole groups of two or more to one prompt; got {len(total)} rows in groups of "
            f"{group}. Make the number of rows a multiple of the environment's group_size."
        )
    grouped = total.view(-1, group)
    return grouped - grouped[:, :1]
