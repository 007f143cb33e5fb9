"""The losses of policies and critics: pure functions, a number a step.

PPO's are TorchRL's ClipPPOLoss to the last digit (a test), written out because its bookkeeping, diagnostics that count
padding among them, costs more than the networks of classic control do.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
