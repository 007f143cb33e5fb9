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
        return {"policy_loss": out["loss_objective"]} | kl_terms(self.kl_loss, self.actor, outputs), diagnose(
            out, batch
        )


def diagnose(out: TensorDict, batch: TensorDict) -> dict[str, Tensor]:
    """ClipPPOLoss' distance between new and old policy and its share of clipped ratios, as sums over valid steps."""
    # TorchRL averages them over padding too, where they are exactly zero (see TextActor).
    steps = batch["mask"].numel()
    return {"approx_kl": out["kl_approx"].detach() * steps, "clip_fraction": out["clip_fraction"].detach() * steps}
