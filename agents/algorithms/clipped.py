"""TorchRL's clipped policy gradient (ClipPPOLoss) with the KL to the reference beside it, in one forward pass."""

from __future__ import annotations

from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from agents.algorithms.actor_critic import head_of
from agents.algorithms.kl_loss import kl_terms


class ClippedPolicy:
    """The policy gradient of an actor without critic, from given advantages."""

    def __init__(self, actor: ProbabilisticTensorDictSequential, clip: float, kl_loss: str) -> None:
        self.actor, self.kl_loss = actor, kl_loss
        self.objective = ClipPPOLoss(
            head_of(actor),
            None,
            clip_epsilon=clip,
            entropy_bonus=False,
            functional=False,
            log_explained_variance=False,
            reduction="none",
            device=next(actor.parameters()).device,
        )
        self.objective.loss_mask_key = "mask"

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, to be summed, and diagnostics."""
        outputs = self.actor.det_part(batch.copy())
        out = self.objective(outputs)
        terms = {"policy_loss": out["loss_objective"]}
        return terms | kl_terms(self.kl_loss, self.actor, outputs), diagnose(out, batch)


def diagnose(out: TensorDict, batch: TensorDict) -> dict[str, Tensor]:
    """How far ClipPPOLoss found the new policy from the old one, as sums over valid steps.

    `approx_kl` is the mean of ρ − 1 − log ρ over sampled actions, never negative (Schulman 2020's k3, KL(old‖new)).
    """
    # TorchRL averages over padding too, where every ratio is exactly 1 (see TextActor).
    steps = batch["mask"].numel()
    approx_kl = out["mean_ratio"] - 1 + out["kl_approx"]
    return {"approx_kl": approx_kl.detach() * steps, "clip_fraction": out["clip_fraction"].detach() * steps}
