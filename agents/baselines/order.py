"""Best-of-n from N samples: how often each of them would be the best of n, and how far best-of-n is from its model.

Pure functions of tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_weights(scores: Tensor, n: int) -> Tensor:
    """How probable it is that each of N samples is the best of n of them, drawn without replacement.

    Weighted by it, the mean of any number over the N samples is the unbiased estimate of that number's mean over the
    best of n with the least variance: it averages over all C(N, n) draws. Of the i-th lowest score the weight is
    C(i − 1, n − 1) / C(N, n). Equal scores share their weights, as if chance decided between them.

    scores: [M, N]; n: from 1 to N. Returns float64 [M, N], rows sum to 1.
    """
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"the best of n needs n from 1 to the number of samples, {count}, got {n}.")
    total = math.comb(count, n)
    cumulative = torch.tensor([math.comb(rank, n) / total for rank in range(count + 1)], dtype=torch.float64)
    ordered = scores.contiguous().sort(1).values.contiguous()  # [M, N]
    below = torch.searchsorted(ordered, scores.contiguous())  # [M, N], how many scores are lower
    up_to = torch.searchsorted(ordered, scores.contiguous(), right=True)  # [M, N], lower or equal
    # The best of n is among the `up_to` lowest and not among the `below` lowest; the equal ones share that.
    return (cumulative[up_to] - cumulative[below]) / (up_to - below)


def kl_bound(n: int) -> float:
    """Log n − (n − 1)/n nats: at most this is the KL of best-of-n to the model that it samples from.

    Often called its KL; Beirami et al. 2024 show that it is an upper bound. It is tight where no response is likely.
    """
    return math.log(n) - (n - 1) / n
