"""The distribution of a list of actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution


class Categorical(torch.distributions.Categorical):
    """PyTorch's, normalized by its one kernel for that, `log_softmax`: half the time on a vocabulary of 50k.

    logits: finite, [..., A]. It cannot be expanded, and reads actions of its own shape.
    """

    def __init__(self, logits: Tensor) -> None:
        normalized: Any = logits.log_softmax(-1)
        self.logits = self._param = normalized
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of actions [...], one a distribution; returns [...]."""
        return self.logits.gather(-1, value[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """−Σ π log π in nats, [...]."""
        return -(self.logits.exp() * self.logits).sum(-1)
