"""Precision of actor and critic: float32, or bfloat16 products over float32 weights.

Weights, gradients and the optimizer's state are float32 either way, and so are log-probabilities, values, losses and
advantages. In bf16, training forwards run under autocast, and responses are sampled by a copy of the actor with
bfloat16 weights: decoding reads all weights for every token, and half the bytes take half the time. A model with
adapters samples by itself, in the dtype of its trunk: give the environment `dtype="bfloat16"` with adapters.

The copy's log-probabilities differ from those of the training forward by rounding. So the ratio of new to old
probability would not start at 1. By default the old log-probabilities are therefore computed again by the training
forward where the precision is bf16, and the difference is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.kl import MAX_LOG_RATIO
from textenv.models.language_model import cast_weights


class Precision:
    """The precision of a run, and its copy of the actor for sampling."""

    def __init__(self, name: str, device: torch.device) -> None:
        """name: float32, bf16, or auto, which is bf16 on CUDA and else float32."""
        self.name = name if name != "auto" else "bf16" if device.type == "cuda" else "float32"
        self.device, self.half = device, self.name == "bf16"
        self.sampler: PreTrainedModel | None = None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """For one forward of trained networks. Never round an optimizer step: autocast keeps copies of weights."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            yield

    @contextmanager
    def tensor_cores(self) -> Iterator[None]:
        """For whatever stays float32 in a bf16 run, such as a float32 reward model: products in TF32 on CUDA."""
        before = torch.get_float32_matmul_precision()
        if self.half:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    @torch.no_grad()
    def sampling_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model that samples for an actor: itself in float32, a bfloat16 copy of its present weights in bf16.

        A model with adapters samples by itself too: a copy would be a second trunk in memory.
        """
        if not self.half or not all(parameter.requires_grad for parameter in model.parameters()):
            return model
        if self.sampler is None:
            self.sampler = cast_weights(copy.deepcopy(model).requires_grad_(False), torch.bfloat16)
        pairs = zip(self.sampler.parameters(), model.parameters(), strict=True)
        for own, new in pairs:  # in place: what was compiled or checked for the copy stays valid
            own.copy_(new)
        return self.sampler


def mismatch(sampled: Tensor, recomputed: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the log-probabilities of sampling and training are apart, over generated tokens.

    `mismatch_mean` and `mismatch_max`: of the absolute difference, in nats. `effective_sample_size`: the share of
    tokens that is left if each is weighted by its ratio of probabilities, (Σ w)² / (N Σ w²).

    sampled, recomputed: float32 [B, R]; mask: bool [B, R].
    """
    difference = (recomputed - sampled)[mask]  # [N]
    weight = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    numbers = torch.stack(
        [
            difference.abs().mean(),
            difference.abs().max(),
            weight.sum().square() / (len(weight) * weight.square().sum()),
        ]
    )
    return dict(zip(("mismatch_mean", "mismatch_max", "effective_sample_size"), numbers.tolist(), strict=True))
