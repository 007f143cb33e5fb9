"""The KL to the reference as a term of the loss (GRPO: Shao et al. 2024) in the place of a part of the reward.

As a part of the reward it is a constant to the policy gradient; here the gradient goes through log π, so other
estimators are right than there (`textenv.kl` says which): k2 has the gradient of KL(π‖π_ref), k3 that of
KL(π_ref‖π). Both hold while the policy is the one that sampled.
"""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from agents.interfaces import Networks
from textenv.kl import ESTIMATORS

KL_LOSSES = ("none", "k2", "k3")


def kl_loss_of(estimator: str, networks: Networks) -> str:
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
