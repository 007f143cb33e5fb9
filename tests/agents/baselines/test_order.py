"""Order statistics of best-of-n against enumeration of all draws, and against the bound's paper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from agents.baselines.order import best_of_weights, kl_bound

ROWS = torch.tensor([[0.3, -1.0, 2.0, 0.1, 5.0, 0.2], [1.0, 1.0, 0.0, 2.0, 2.0, 2.0], [4.0] * 6])


def enumerated(scores: list[float], n: int) -> list[float]:
    """The share of all draws of n in which each sample is the best; those that tie for it share a draw."""
    weights, draws = [0.0] * len(scores), list(itertools.combinations(range(len(scores)), n))
    for draw in draws:
        highest = max(scores[index] for index in draw)
        best = [index for index in draw if scores[index] == highest]
        for index in best:
            weights[index] += 1 / len(best) / len(draws)
    return weights


@pytest.mark.parametrize("n", range(1, 7))
def test_weights_are_those_of_all_draws(n: int) -> None:
    """For every n, with and without ties, each weight is the share of all C(N, n) draws that the sample wins."""
    for row, weights in zip(ROWS.tolist(), best_of_weights(ROWS, n).tolist(), strict=True):
        assert weights == pytest.approx(enumerated(row, n), abs=1e-12)


def test_many_samples() -> None:
    """With 1,000 samples the weights are finite and sum to 1; the best of all of them is the highest alone."""
    scores = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 500, 1000):
        assert best_of_weights(scores, n).sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert best_of_weights(scores, 1000).argmax(1).tolist() == scores.argmax(1).tolist()
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"from 1 to the number of samples, 1000, got {n}"):
            best_of_weights(scores, n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_the_bound_is_above_the_kl(n: int) -> None:
    """The exact KL of best-of-n over a few responses is below the bound, and reaches it where all are unlikely."""
    for size, near in ((4, False), (100_000, True)):
        cumulative = torch.arange(size + 1, dtype=torch.float64) / size  # a uniform model, responses in order of score
        best = cumulative.pow(n).diff()
        exact = float((best * (best * size).clamp_min(1e-300).log()).sum())
        assert exact <= kl_bound(n) + 1e-9
        if near:
            assert exact == pytest.approx(kl_bound(n), abs=1e-3)
    assert kl_bound(1) == 0.0 and kl_bound(2) == pytest.approx(math.log(2) - 0.5)
