"""Sampling from logits: temperature, top-k, top-p, and the log-probability under the sampled distribution.

Pure functions; random numbers are an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's logits."""

    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens with at least this total probability

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature}; for greedy decoding use top_k=1."
            )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number, 0 (off) or more, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


def log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of the sampling distribution; -inf for filtered tokens.

    logits: [..., V]. Returns float32 [..., V]. Temperature comes first, then top-k, then top-p (Holtzman et al. 2020),
    the order of Transformers.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        mass_before = mass.cumsum(-1) - mass
        drop = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits.log_softmax(-1)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row, and return its log-probability.

    The token is where the running sum of probabilities passes the row's random number, so a row's choice depends on
    nothing but its logits and that number. The sums are of whole numbers, in units of 2^-52, and so exact in any order:
    a token of probability 0 is never drawn, on any device. Where logits are NaN the token is any, and its
    log-probability NaN.

    logits: [B, V]; uniform: float64 [B], in [0, 1). Returns int64 [B] and float32 [B].
    """
    distribution = log_probs(logits, sampling)  # [B, V]
    mass = distribution.exp().mul_(2.0**52).long().cumsum_(-1)  # [B, V]
    total = mass[:, -1:]
    drawn = (uniform[:, None] * total).long().minimum(total - 1)  # [B, 1]
    tokens = torch.searchsorted(mass, drawn, right=True).clamp_max(logits.shape[-1] - 1)
    return tokens[:, 0], distribution.gather(1, tokens)[:, 0]


def chosen_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of `tokens` at a temperature, without top-k and top-p.

    logits: [..., V]; tokens: int64 [...]. Returns float32 [...].
    """
    logits = logits.float() / temperature
    return logits.gather(-1, tokens.unsqueeze(-1))[..., 0] - logits.logsumexp(-1)
