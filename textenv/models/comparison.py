"""Are two ways to compute logits equal? Sample texts, a distance, and its bound, for the checks of a loaded model."""

from __future__ import annotations

import torch
from torch import Tensor

from textenv.state import TextState


def bound(dtype: torch.dtype) -> float:
    """The largest `relative_difference` that rounding explains, in the dtype of the weights.

    Measured: up to 7e-6 in float32 over a hundred architectures and 30 layers; 6.5 machine epsilons in bfloat16 with 30
    layers. Wrong masks and positions were above 0.19 on the average of states, and more at the worst.
    """
    epsilon = torch.finfo(dtype).eps
    return 16 * epsilon if epsilon > 1e-5 else 256 * epsilon  # in float32 the order of the additions counts as well


def largest_difference(values: Tensor, expected: Tensor) -> float:
    """The largest difference of hidden states or scores, over the largest of the expected. Infinite if not finite."""
    relative = float((values.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12))
    return relative if relative == relative else torch.inf


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference of log-probabilities at the worst state, over the spread of the logits.

    logits, expected: [..., V]. Infinite if a number is not finite.
    """
    expected = expected.float()
    difference = (logits.float().log_softmax(-1) - expected.log_softmax(-1)).square().mean(-1).sqrt().max()
    relative = float(difference / expected.std(-1).max().clamp_min(torch.finfo(torch.float32).tiny))
    return relative if relative == relative else torch.inf


def sample_texts(vocabulary: int, columns: int, steps: int, device: torch.device) -> TextState:
    """Three texts of random tokens: one fills all L columns, the others are short. Prompts [3, P], no response yet.

    steps: columns left for the response.
    """
    width = columns - steps
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (3, columns), generator=generator).to(device)
    starts = torch.tensor([0, max(width - 4, 0), max(width - 7, 0)], device=device)  # of the left-padded prompts
    places = torch.arange(columns, device=device)
    mask = (places >= starts[:, None]) & (places < width)
    return TextState(ids, mask, torch.zeros_like(mask), torch.zeros(3, dtype=torch.long, device=device), width)
