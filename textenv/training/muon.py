"""Muon for the matrices of a GPT-2 (Jordan et al. 2024) and AdamW for its other parameters, in one optimizer.

The embedded task's supervised model has to learn a grammar within minutes on two CPU cores. Muon needs about half the
steps of AdamW there. Its iteration runs in float32, because bfloat16 is slow on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

MOMENTUM, WEIGHT_DECAY, STEPS = 0.95, 0.01, 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that maps singular values near 1, from the Muon reference


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with its singular values moved close to 1 by Newton-Schulz steps. [m, n] -> [m, n]."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(Optimizer):
    """Momentum, then an orthogonalized step for every block of a matrix stored [in, out].

    AdamW steps the other parameters at a constant learning rate: a schedule reaches Muon's alone.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        lr: float,
        adam_lr: float,
        weight_decay: float = WEIGHT_DECAY,
    ) -> None:
        if not matrices or not others:
            raise ValueError("Muon needs matrices and other parameters; use AdamW for a model without one of them.")
        self._adam = AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=weight_decay)
        super().__init__([{"params": matrices, "lr": lr, "weight_decay": weight_decay}], {})
        # A schedule scales the learning rates of these groups, and so Muon's alone: AdamW keeps groups of its own.
        self.param_groups += [dict(group) for group in self._adam.param_groups]
        self._adam.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and state from a checkpoint: `load_state_dict` ends here. AdamW's state is a part of it."""
        super().__setstate__(state)
        self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters."""
        self._adam.step()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            step = parameter.grad.lerp(momentum, MOMENTUM)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(torch.cat([*_blocks(step)], 1), alpha=-group["lr"])


def _blocks(step: Tensor) -> Iterator[Tensor]:
    """Orthogonalized blocks of a step: GPT-2's matrix of query, key and value has three, other matrices one."""
    rows, columns = step.shape
    parts = step.split(rows, 1) if columns == 3 * rows else (step,)
    for part in parts:
        yield orthogonalized(part) * max(1.0, part.shape[1] / part.shape[0]) ** 0.5


def muon_for(model: PreTrainedModel, lr: float, adam_lr: float, weight_decay: float = WEIGHT_DECAY) -> Muon:
    """An optimizer for a GPT-2: Muon for the matrices of its blocks, AdamW for embeddings, norms and biases.

    Raises ValueError for another architecture, whose matrices may be stored [out, in].
    """
    if model.config.model_type != "gpt2":
        raise ValueError(f"muon is for GPT-2 models, and this is a {type(model).__name__}; use adamw.")
    named = list(model.named_parameters())
    matrices = [p for name, p in named if ".h." in name and p.ndim == 2]
    others = [p for name, p in named if not (".h." in name and p.ndim == 2)]
    return Muon(matrices, others, lr, adam_lr, weight_decay)
