"""Losses of policies and critics: pure functions, one number per step.

They equal TorchRL's ClipPPOLoss, A2CLoss and ReinforceLoss (tests). TorchRL's modules average their diagnostics over
padding, and their bookkeeping costs more than the networks of classic control.

The KL to the reference can be a term of the loss (GRPO: Shao et al. 2024) instead of a part of the reward. In the
reward it is a constant to the policy gradient; in the loss the gradient flows through log π, so other estimators are
right (see `textenv.kl`): k2 has the gradient of KL(π‖π_ref), k3 that of KL(π_ref‖π), both while the policy is the one
that sampled.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.interfaces import ActionDistribution, Loss, NetworkFactory
from textenv.kl import ESTIMATORS, MAX_LOG_RATIO
from textenv.unread import Unread

KL_LOSSES = ("none", "k2", "k3")  # estimators of the KL in the loss
KL_LOSS_UNREAD = Unread(
    ("kl_loss",),
    lambda job: job.factory.alpha == 0 and job.algorithm.kl_loss != "none",
    "there is no penalty, and so no KL for the loss; give --env.kl-coef 0.1 or so on text, or leave it out.",
)


def policy_gradient(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """−A log π (REINFORCE: Williams 1992). All [B, R]."""
    return -log_prob * advantage


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old (PPO: Schulman et al. 2017). All [B, R].

    Computed as −min(ρ A, A + ε |A|), which is equal (Achiam 2018) and cheaper to differentiate: the sign of A decides
    which of the two bounds is active.
    """
    return -(ratio * advantage).clamp(max=advantage + clip * advantage.abs())


def dual_clipped(policy_loss: Tensor, advantage: Tensor, bound: float) -> Tensor:
    """Dual clip (Ye et al. 2020): where the advantage is negative, the loss is at most −bound · advantage.

    policy_loss, advantage: [B, R].
    """
    return torch.where(advantage < 0, torch.minimum(policy_loss, -bound * advantage), policy_loss)


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """½ (V − target)². All [B, R]."""
    return 0.5 * (value - target).square()


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """½ max((V − target)², (V_old ± c clip − target)²): no gain beyond a change of c. All [B, R]."""
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum(value_loss(value, target), value_loss(near, target))


@torch.no_grad()
def distance(log_ratio: Tensor, ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """Distance of the new policy from the old one, summed over steps; a step of ratio 1 adds nothing.

    `approx_kl`: ρ − 1 − log ρ, never negative, with mean KL(old‖new) (k3 of Schulman 2020). `clip_fraction`: steps
    with a ratio outside 1 ± clip. log_ratio, ratio: [B, R].
    """
    change = ratio - 1
    return {"approx_kl": (change - log_ratio).sum(), "clip_fraction": (change.abs() > clip).sum()}


def clipped_terms(distribution: ActionDistribution, batch: TensorDict, clip: float, kl_loss: str) -> Loss:
    """`policy_loss`, and `kl_loss` if it is on, [B, R] each; and the policy's `distance` from the old one.

    distribution: the current actor's, at every step of the batch. Log-ratios above 20 count as 20 and have no gradient:
    the exponential of 89 is infinite in float32, and its gradient NaN. Small ones need no bound.
    """
    log_prob, mask = distribution.log_prob(batch["action"]), batch["mask"]  # [B, R] both
    log_ratio = (log_prob - batch["action_log_prob"]).where(mask, 0.0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    terms = {"policy_loss": clipped_surrogate(ratio, batch["advantage"].where(mask, 0.0), clip)}
    return terms | kl_terms(kl_loss, log_prob, batch), distance(log_ratio, ratio, clip)


def available_kl_loss(estimator: str, factory: NetworkFactory) -> str:
    """The estimator, or none if the environment has no penalty."""
    return estimator if factory.alpha > 0 else "none"


def kl_terms(kl_loss: str, log_prob: Tensor, batch: TensorDict) -> dict[str, Tensor]:
    """The term `kl_loss` [B, R], or no term if `kl_loss` is none. log_prob: the current actor's, [B, R]."""
    if kl_loss == "none":
        return {}
    reference_log_prob, kl_coef, mask = batch["reference_log_prob"], batch["kl_coef"], batch["mask"]
    return {"kl_loss": kl_penalty(log_prob, reference_log_prob, kl_coef, mask, estimator=kl_loss)}


def kl_penalty(
    log_prob: Tensor, reference_log_prob: Tensor, kl_coef: Tensor, mask: Tensor, *, estimator: str
) -> Tensor:
    """β times an estimate of the KL at every step, differentiable through log_prob.

    log_prob, reference_log_prob: float [B, R]; kl_coef: β, [B]; mask: bool [B, R]. Returns [B, R], zero outside the
    mask.
    """
    estimate = ESTIMATORS[estimator](log_prob.where(mask, 0.0), reference_log_prob.where(mask, 0.0))
    return kl_coef[:, None] * estimate
