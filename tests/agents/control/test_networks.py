"""What plays classic control is the network that is learned, and its chance is the policy's."""

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
    """For three observations, and weights that tell states apart."""
    return ControlNetworkFactory(gym.spaces.Box(-1, 1, (3,)), action, ControlConfig(**settings), seed=5)


def draws(policy) -> Tensor:
    """Many actions in one state, over two steps of a rollout."""
    act = policy.player(2, DRAWS // 2, torch.Generator().manual_seed(0))
    first, second = (act(STATE.expand(DRAWS // 2, -1)) for _ in range(2))
    assert not torch.equal(first, second)  # chance is new at every step
    return torch.cat([first, second])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 5)])
def test_the_frozen_function_is_the_networks(hidden, activation):
    """Without modules it computes the same, changes no input, and later updates do not reach it."""
    torch.manual_seed(0)
    network = MLP((3, *hidden, 4), activation, gain=1.0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    rows, function = torch.randn(6, 3), network.frozen()
    kept, expected = rows.clone(), network(rows)
    torch.testing.assert_close(function(rows), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(function(rows), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, kept) and not function(rows).requires_grad


@pytest.mark.parametrize("kind", ["actor", "soft", "greedy"])
def test_actions_of_a_list_are_drawn_by_the_policy(kind):
    """As often as their probability says: softmax of logits, of values over a temperature, or the best but for ε."""
    torch.manual_seed(0)
    made = networks(gym.spaces.Discrete(4))
    policy = made.actor() if kind == "actor" else made.q_network(0.7 if kind == "soft" else 0.0)
    torch.nn.init.normal_(policy.layers[-1].bias)
    outputs = policy(STATE).detach()
    probability = (outputs / (0.7 if kind == "soft" else 1.0)).softmax(-1)
    if kind == "greedy":
        policy.epsilon.fill_(0.4)
        probability = torch.full((4,), 0.1)
        probability[outputs.argmax()] = 0.7
    share = torch.bincount(draws(policy), minlength=4) / DRAWS
    assert share.tolist() == pytest.approx(probability.tolist(), abs=5 * 0.5 / math.sqrt(DRAWS))
    every = policy.log_prob(STATE.expand(4, -1), torch.arange(4))
    assert every.exp().tolist() == pytest.approx(probability.tolist(), abs=1e-6)


@pytest.mark.parametrize("distribution", ["gaussian", "tanh"])
def test_continuous_actions_are_drawn_by_the_policy(distribution):
    """Mean and deviation are the network's, before tanh squashes them into the bounds."""
    torch.manual_seed(0)
    space = gym.spaces.Box(torch.tensor([-2.0, 0.0]).numpy(), torch.tensor([2.0, 3.0]).numpy())
    policy = networks(space, distribution=distribution, initial_log_std=-0.5).actor()
    torch.nn.init.normal_(policy.body.layers[-1].bias)
    loc, scale = (part.detach() for part in policy(STATE))
    found = draws(policy)
    if distribution == "tanh":
        assert (found > policy.low).all() and (found < policy.high).all()
        found = ((found - policy.low) / (policy.high - policy.low) * 2 - 1).atanh()
    assert found.mean(0).tolist() == pytest.approx(loc.tolist(), abs=5 * float(scale.max()) / math.sqrt(DRAWS))
    assert found.std(0).tolist() == pytest.approx(scale.tolist(), rel=5 / math.sqrt(2 * DRAWS) + 1e-3)
