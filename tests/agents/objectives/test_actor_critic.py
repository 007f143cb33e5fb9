"""The distribution of actions is PyTorch's, whatever it saves."""

from __future__ import annotations

import torch

from agents.objectives.actor_critic import Categorical


def test_categorical_is_pytorchs():
    """Log-probabilities, entropy, their gradients, probabilities, mode and draws; nothing at all where it is certain."""
    torch.manual_seed(0)
    logits, weight = 3 * torch.randn(4, 5, 7), torch.randn(2, 4, 5)
    logits[0, 0, 1:] = -1e4  # certain of one action, as padding is
    action, found = torch.randint(7, (4, 5)), []
    action[0, 0] = 0
    for kind in (Categorical, torch.distributions.Categorical):
        leaf = logits.clone().requires_grad_()
        distribution = kind(logits=leaf)
        log_prob, entropy = distribution.log_prob(action), distribution.entropy()
        (torch.stack([log_prob, entropy]) * weight).sum().backward()
        torch.manual_seed(1)
        draws = distribution.sample(torch.Size([3])).float()
        found.append([log_prob, entropy, leaf.grad, distribution.probs, distribution.mode.float(), draws])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert found[0][1][0, 0] == 0 and not found[0][2][0, 0].any()
