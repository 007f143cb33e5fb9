"""Proximal policy optimisation (Schulman et al. 2017), as RLHF uses it (Ziegler et al. 2019).

TorchRL's ClipPPOLoss on whole sequences: one forward pass a network and batch, padding masked out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from agents.advantages import estimate_advantages, explained_variance, td_errors, whiten


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO."""

    epochs: int = 4  # passes over each rollout
    clip: float = 0.2  # the ratio of new to old probability counts within 1 ± clip
    value_clip: float = 0.2  # a value may move this far from its old one before its gradient stops; 0 is off
    entropy_coef: float = 0.0  # weight of an entropy bonus; 0 saves its cost
    gamma: float = 1.0  # discount per token
    lmbda: float = 0.95  # GAE's mix of TD errors (0) and whole returns (1)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}.")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}.")
        for name in ("value_clip", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("gamma", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")


class PPO:
    """The three verbs of an algorithm."""

    on_policy = True

    def __init__(self, config: PPOConfig, actor: ProbabilisticTensorDictSequential, critic: TensorDictModule) -> None:
        self.config, self.actor, self.critic = config, actor, critic
        self.objective = ClipPPOLoss(
            actor,
            critic,
            clip_epsilon=config.clip,
            clip_value=config.value_clip or None,
            critic_coeff=0.5,  # the ½ of the value loss; the networks share no weight, so it needs no other
            loss_critic_type="l2",
            entropy_bonus=config.entropy_coef > 0,
            entropy_coeff=config.entropy_coef,
            functional=False,
            log_explained_variance=False,
        )
        self.objective.loss_mask_key = "mask"

    @torch.no_grad()
    def prepare(self, rollout: TensorDict, rows_per_pass: int) -> dict[str, float]:
        """Adds `state_value`, whitened `advantage` and `value_target`, all [B, R, 1].

        Returns what the critic knew before it was updated.
        """
        mask = rollout["mask"]
        value = torch.cat([self._values(part) for part in rollout.split(rows_per_pass)])[..., 0]  # [B, R + 1]
        advantage, target = estimate_advantages(
            rollout["shaped_reward"], value, mask, self.config.gamma, self.config.lmbda
        )
        rollout["state_value"] = value[:, :-1].where(mask, 0.0)[..., None]
        rollout["td_error"] = td_errors(rollout["shaped_reward"], value, mask, self.config.gamma)[..., None]
        rollout["raw_advantage"] = advantage[..., None]
        rollout["advantage"] = whiten(advantage, mask)[..., None]
        rollout["value_target"] = target[..., None]
        return {"explained_variance": float(explained_variance(value[:, :-1], target, mask))}

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named loss terms to be summed, and diagnostics; all means over the valid tokens of the batch."""
        out = self.objective(batch)
        terms = {"policy_loss": out["loss_objective"], "value_loss": out["loss_critic"]}
        if self.config.entropy_coef > 0:
            terms["entropy_loss"] = out["loss_entropy"]
        # TorchRL averages these over padding too, where they are exactly zero (see TextActor).
        per_valid = batch["mask"].numel() / batch["mask"].sum()
        diagnostics = {
            "approx_kl": out["kl_approx"].mean() * per_valid,
            "clip_fraction": out["clip_fraction"].mean() * per_valid,
        }
        return terms, {name: value.detach() for name, value in diagnostics.items()}

    def after_step(self) -> None:
        """Nothing: PPO has no target networks."""

    def _values(self, part: TensorDict) -> Tensor:
        return self.critic.module.all_states(part["input_ids"], part["attention_mask"], part["mask"])
