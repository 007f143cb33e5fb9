"""The penalty of a training run: which estimate of the KL, and who sets its weight β."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.text.config import TextConfig
from textenv.generation import Generation, response_kl
from textenv.kl import ESTIMATORS, EXACT, AdaptiveKL, Controller, FixedKL
from textenv.task import Task


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What one rollout pays at every token: β times an estimate of the KL."""

    coef: float  # β
    estimator: str = "k1"  # k1, k2, k3 or exact


def make_controller(config: TextConfig, kl_coef: float) -> Controller:
    """Who sets β in a run, from the environment's `kl_coef` on."""
    if kl_coef == 0 and (config.kl_estimator != "k1" or config.kl_controller != "fixed"):
        raise ValueError(
            f"the environment's kl_coef is 0, so there is no reference and no KL for kl_estimator="
            f"{config.kl_estimator!r} and kl_controller={config.kl_controller!r}; give --env-arg kl_coef=0.1 or so, "
            "or leave both at their defaults."
        )
    if config.kl_controller == "fixed":
        return FixedKL(kl_coef)
    assert config.kl_target is not None  # the configuration has checked it
    return AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon, config.kl_unit)


@torch.no_grad()
def estimate_kl(
    task: Task,
    model: PreTrainedModel,
    generation: Generation,
    reference_log_prob: Tensor,
    estimator: str,
    rows_per_pass: int,
) -> Tensor:
    """The KL to the reference at every token of responses that `model` has sampled; zeros without a reference.

    `exact` costs one more forward of both models, over `rows_per_pass` rows at a time. Returns float32 [B, R], zero
    outside the response.
    """
    if task.reference is None:
        return torch.zeros_like(reference_log_prob)
    if estimator == EXACT:
        return response_kl(model, task.reference.model, generation, task.config.temperature, rows_per_pass)
    return ESTIMATORS[estimator](generation.log_prob, reference_log_prob)
