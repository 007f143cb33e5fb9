"""Actions that the collector samples follow the distribution of the network being trained."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from agents.control.config import ControlConfig
from agents.control.networks import MLP, ControlNetworkFactory

STATE = torch.tensor([0.3, -1.2, 0.7])
DRAWS = 40_000


def networks(action: gym.Space, **settings) -> ControlNetworkFactory:
    """A factory for observations of three numbers."""
    return ControlNetworkFactory(gym.spaces.Box(-1, 1, (3,)), action, ControlConfig(**settings), seed=5)


def sample(policy) -> Tensor:
    """`DRAWS` actions in one state, over two steps of a rollout."""
    sample_action = policy.action_sampler(2, DRAWS // 2, torch.Generator().manual_seed(0))
    first, second = (sample_action(STATE.expand(DRAWS // 2, -1)) for _ in range(2))
    assert not torch.equal(first, second)  # every step has its own noise
    return torch.cat([first, second])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 5)])
def test_a_snapshot_equals_the_network(hidden, activation):
    """A snapshot computes the same outputs, leaves its input unchanged, and does not follow later updates."""
    torch.manual_seed(0)
    network = MLP((3, *hidden, 4), activation, gain=1.0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    rows, snapshot = torch.randn(6, 3), network.snapshot()
    original_rows, expected = rows.clone(), network(rows)
    torch.testing.assert_close(snapshot(rows), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(snapshot(rows), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, original_rows) and not snapshot(rows).requires_grad


@pytest.mark.parametrize("kind", ["actor", "soft", "greedy"])
def test_discrete_actions_follow_the_policy(kind):
    """Sampled frequencies match softmax of logits, softmax of Q over a temperature, and ε-greedy; so does log_prob."""
    torch.manual_seed(0)
    factory = networks(gym.spaces.Discrete(4))
    policy = factory.actor() if kind == "actor" else factory.q_network(0.7 if kind == "soft" else 0.0)
    torch.nn.init.normal_(policy.layers[-1].bias)
    outputs = policy(STATE).detach()
    probability = (outputs / (0.7 if kind == "soft" else 1.0)).softmax(-1)
    if kind == "greedy":
        policy.epsilon.fill_(0.4)
        probability = torch.full((4,), 0.1)
        probability[outputs.argmax()] = 0.7
    frequency = torch.bincount(sample(policy), minlength=4) / DRAWS
    assert frequency.tolist() == pytest.approx(probability.tolist(), abs=5 * 0.5 / math.sqrt(DRAWS))
    log_probs = policy.log_prob(STATE.expand(4, -1), torch.arange(4))
    assert log_probs.exp().tolist() == pytest.approx(probability.tolist(), abs=1e-6)


@pytest.mark.parametrize("distribution", ["gaussian", "tanh"])
def test_continuous_actions_follow_the_policy(distribution):
    """Sampled mean and standard deviation are the network's, before tanh squashes actions into the bounds."""
    torch.manual_seed(0)
    space = gym.spaces.Box(torch.tensor([-2.0, 0.0]).numpy(), torch.tensor([2.0, 3.0]).numpy())
    policy = networks(space, distribution=distribution, initial_log_std=-0.5).actor()
    torch.nn.init.normal_(policy.body.layers[-1].bias)
    loc, scale = (part.detach() for part in policy(STATE))
    actions = sample(policy)
    if distribution == "tanh":
        assert (actions > policy.low).all() and (actions < policy.high).all()
        actions = ((actions - policy.low) / (policy.high - policy.low) * 2 - 1).atanh()
    assert actions.mean(0).tolist() == pytest.approx(loc.tolist(), abs=5 * float(scale.max()) / math.sqrt(DRAWS))
    assert actions.std(0).tolist() == pytest.approx(scale.tolist(), rel=5 / math.sqrt(2 * DRAWS) + 1e-3)
