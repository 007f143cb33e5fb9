"""The clipped policy gradient with the KL to the reference beside it, in one forward pass."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Distribution

from agents.algorithms.kl_loss import kl_terms
from agents.losses import clipped_surrogate, distance


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
