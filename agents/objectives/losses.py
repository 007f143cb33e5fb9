"""The losses of policies and critics: pure functions, a number a step.

PPO's are TorchRL's ClipPPOLoss to the last digit (a test), written out because its bookkeeping, diagnostics that count
padding among them, costs more than the networks of classic control do.

The KL to the reference may be a term of the loss (GRPO: Shao et al. 2024) in the place of a part of the reward.
As a part of the reward it is a constant to the policy gradient; here the gradient goes through log π, so other
estimators are right than there (`textenv.kl` says which): k2 has the gradient of KL(π‖π_ref), k3 that of
KL(π_ref‖π). Both hold while the policy is the one that sampled.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Distribution

from agents.interfaces import NetworkFactory
from textenv.kl import ESTIMATORS

KL_LOSSES = ("none", "k2", "k3")  # estimators of the KL as a term of the loss


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old (PPO: Schulman et al. 2017). All [B, R].

    Written as −min(ρ A, A + ε |A|), which is the same (Achiam 2018) with less work in the gradient: the sign of A says
    which of the two bounds can act.
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
    """½ max((V − target)², (V_old ± c clip − target)²): no gain in moving a value far at once. All [B, R]."""
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum(value_loss(value, target), value_loss(near, target))


@torch.no_grad()
def distance(log_ratio: Tensor, ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """How far the new policy is from the old one, summed over steps; a step of ratio 1 adds nothing.

    `approx_kl`: ρ − 1 − log ρ, never negative, whose mean is KL(old‖new) (Schulman 2020's k3). `clip_fraction`: the
    steps whose ratio is outside 1 ± clip. log_ratio, ratio: [B, R].
    """
    change = ratio - 1
    return {"approx_kl": (change - log_ratio).sum(), "clip_fraction": (change.abs() > clip).sum()}


def clipped_terms(
    distribution: Distribution, batch: TensorDict, clip: float, kl_loss: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`policy_loss` [B, R], and `kl_loss` where there is one; and how far the policy has moved, for the log.

    distribution: the actor's now, at every step of the batch.
    """
    log_prob, mask = distribution.log_prob(batch["action"]), batch["mask"]  # [B, R] both
    log_ratio = (log_prob - batch["action_log_prob"]).where(mask, 0.0)
    ratio = log_ratio.exp()
    terms = {"policy_loss": clipped_surrogate(ratio, batch["advantage"][..., 0], clip)}
    return terms | kl_terms(kl_loss, log_prob, batch), distance(log_ratio, ratio, clip)


def kl_loss_of(estimator: str, networks: NetworkFactory) -> str:
    """The estimator, or none where the environment has no penalty and so no reference."""
    return estimator if networks.temperature > 0 else "none"


def reward_key(estimator: str) -> str:
    """Which reward is learned from: with the KL in the loss, the one without a penalty."""
    return "shaped_reward" if estimator == "none" else "task_reward"


def kl_terms(estimator: str, log_prob: Tensor, batch: TensorDict) -> dict[str, Tensor]:
    """`kl_loss` [B, R] of a batch, or nothing where there is none. log_prob: the actor's now, [B, R]."""
    if estimator == "none":
        return {}
    reference_log_prob, kl_coef, mask = batch["reference_log_prob"], batch["kl_coef"], batch["mask"]
    return {"kl_loss": kl_penalty(log_prob, reference_log_prob, kl_coef, mask, estimator=estimator)}


def kl_penalty(
    log_prob: Tensor, reference_log_prob: Tensor, kl_coef: Tensor, mask: Tensor, *, estimator: str
) -> Tensor:
    """β times an estimate of the KL at every step, with its gradient through log_prob.

    log_prob, reference_log_prob: float [B, R]; kl_coef: β, [B]; mask: bool [B, R]. Returns [B, R], zero outside the
    mask.
    """
    estimate = ESTIMATORS[estimator](log_prob.where(mask, 0.0), reference_log_prob.where(mask, 0.0))
    return kl_coef[:, None] * estimate
