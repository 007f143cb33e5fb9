"""Tokens that the masks forbid get no probability, at any sampling temperature and any size of the logits."""

from __future__ import annotations

import pytest
import torch

from agents.objectives.actor_critic import Categorical
from agents.text.networks import forbid
from tests.support.learning import losses, make_rollout, make_trainer, whole
from textenv.masks.token_sets import TokenSets


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_only_allowed_tokens_have_probability(size, shift):
    """Log-probabilities and entropy are those of the allowed logits alone, and so is the gradient; it is finite."""
    generator = torch.Generator().manual_seed(0)
    leaf = (size * (shift + torch.randn(2, 3, 9, generator=generator))).requires_grad_()
    inside = torch.rand(2, 3, 9, generator=generator) < 0.5
    inside[..., 4] = True
    distribution = Categorical(forbid(leaf, TokenSets.of(inside)))
    (distribution.entropy().sum() + distribution.log_prob(torch.full((2, 3), 4)).sum()).backward()
    for row in range(2):
        for t in range(3):
            chosen = inside[row, t]
            alone = leaf.detach()[row, t, chosen].requires_grad_()  # the allowed logits, as a distribution of their own
            log_prob = alone.log_softmax(-1)
            torch.testing.assert_close(distribution.logits[row, t, chosen], log_prob, rtol=1e-6, atol=1e-6)
            assert not distribution.probs[row, t, ~chosen].any()
            entropy = torch.distributions.Categorical(logits=alone).entropy()
            torch.testing.assert_close(distribution.entropy()[row, t], entropy, rtol=1e-5, atol=1e-6)
            (entropy + log_prob[int(chosen[:4].sum())]).backward()
            torch.testing.assert_close(leaf.grad[row, t, chosen], alone.grad, rtol=1e-4, atol=1e-5)
            assert not leaf.grad[row, t, ~chosen].any()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("learner", ["ppo", "dqn", "sac"])
def test_learners_at_a_low_temperature(settings, learner):
    """At τ = 1e-4 learners see the policy that sampled: the same log-probabilities, and finite losses and gradients."""
    algorithm = dict(learning_starts=8, alpha=0.3) if learner in ("dqn", "sac") else {}
    trainer = make_trainer(settings | {"action_mask": "words:no,yes", "temperature": 1e-4}, algorithm, learner)
    data = make_rollout(trainer).data
    states = whole(trainer.algorithm.networks.policy, data)  # [B, R, V]
    log_prob = Categorical(states / 0.3 if learner == "dqn" else states).log_prob(data["action"])
    # Logits of up to 1e6: a rounding of 0.1.
    torch.testing.assert_close(log_prob[data["mask"]], data["action_log_prob"][data["mask"]], rtol=1e-3, atol=0.2)
    sum(losses(trainer, data).values()).backward()
    for network in trainer.algorithm.networks.trained.values():
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())
