"""Action values: the formulas by hand, and TorchRL's own losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, ValueEstimators
from torchrl.objectives.sac import DiscreteSACLoss

from agents.algorithms.dqn import DQN, DQNConfig
from agents.algorithms.sac import SAC, SACConfig
from agents.objectives.advantages import Ends, response_ends
from agents.objectives.soft_q import ReplayConfig, TargetNetwork, action_targets, soft_value
from tests.support.learning import loss
from tests.support.vectors import ACTIONS, VectorNetworks, as_torchrl, make_batch

GAMMA = 0.9
# TorchRL's losses ask for an updater of their target networks, which one look at a loss does not need.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def test_soft_value_by_hand():
    """Two actions: the maximum, the double estimate, the log-sum-exp, and the soft double estimate."""
    online, target = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])
    assert soft_value(target, target, 0.0) == 5 and soft_value(online, target, 0.0) == 3
    assert float(soft_value(target, target, 2.0)) == pytest.approx(2 * math.log(math.exp(2.5) + math.exp(1.5)))
    p = 1 / (1 + math.exp(0.5))  # softmax of (0.5, 1): the first
    expected = p * (5 - 2 * math.log(p)) + (1 - p) * (3 - 2 * math.log(1 - p))
    assert float(soft_value(online, target, 2.0)) == pytest.approx(expected)


def test_action_targets_by_hand():
    """Ends cut, time limits bootstrap, λ mixes; numbers worked out on paper with γ = λ = ½."""
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 9.0]])
    value = torch.tensor([[7.0, 8.0, 6.0, 9.0], [7.0, 8.0, 6.0, 9.0]])
    taken = torch.tensor([[2.0, 3.0, 5.0], [2.0, 3.0, 5.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    done = torch.tensor([[False, False, True], [False, True, False]])
    terminated = torch.tensor([[False, False, False], [False, True, False]])
    # errors: 1 + 4 - 2, 2 + 3 - 3, 4 + 4.5 - 5 by a time limit; 1 + 4 - 2, 2 + 0 - 3, and padding
    expected = [
        [2 + 3 + 2 / 4 + 3.5 / 16, 3 + 2 + 3.5 / 4, 5 + 3.5],
        [2 + 3 - 1 / 4, 3 - 1],
    ]
    found = action_targets(reward, value, taken, Ends(mask, done, terminated), 0.5, 0.5)
    assert found[0].tolist() == pytest.approx(expected[0]) and found[1, :2].tolist() == pytest.approx(expected[1])
    one_step = action_targets(reward, value, taken, Ends(mask, done, terminated), 0.5, 0.0)
    assert one_step[0].tolist() == pytest.approx([5, 5, 8.5]) and one_step[1, :2].tolist() == pytest.approx([5, 2])


def test_targets_skip_tokens_of_the_environment():
    """Q(λ) targets of a response with tokens in between that the policy did not write, by a loop over its own."""
    generator = torch.Generator().manual_seed(0)
    reward, value, old = (torch.randn(1, size, generator=generator) for size in (6, 7, 6))
    mask = torch.tensor([[True, True, False, False, True, False]])
    targets = action_targets(reward, value, old, response_ends(mask), 0.9, 0.6)
    own, ahead = [0, 1, 4], 0.0
    for place in reversed(range(3)):
        t = own[place]
        after = 0.0 if place == 2 else float(value[0, own[place + 1]])
        ahead = float(reward[0, t]) + 0.9 * after - float(old[0, t]) + 0.9 * 0.6 * ahead
        assert float(targets[0, t]) == pytest.approx(float(old[0, t]) + ahead, abs=1e-6)


def test_target_networks_follow():
    """Every second step, a quarter of the way."""
    online = torch.nn.Linear(1, 1, bias=False)
    target = TargetNetwork(online, ReplayConfig(target_update_interval=2, tau=0.25))
    start = float(online.weight.detach())
    with torch.no_grad():
        online.weight += 4
    found = []
    for _ in range(4):
        target.update(online)
        found.append(float(next(target.network.parameters())) - start)
    assert found == pytest.approx([0, 1, 1, 1.75])
    assert not any(parameter.requires_grad for parameter in target.parameters())


def moved(module, seed):
    """Moves the weights of a target network away from the online one's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def gradients(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def means(learner, batch):
    """Each loss term's mean, whose sum's gradient is then in the weights."""
    terms = {name: term.mean() for name, term in loss(learner, batch)[0].items()}
    sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
def test_dqn_is_torchrls(double, loss_function):
    """At α = 0 loss and gradient are those of TorchRL's DQNLoss, time limits and all."""
    batch = make_batch()
    learner = DQN(DQNConfig(gamma=GAMMA, double=double, loss_function=loss_function, lmbda=0.0), VectorNetworks())
    moved(learner.networks.target.network, seed=2)
    theirs = DQNLoss(
        QValueActor(copy.deepcopy(learner.networks.policy.layers), in_keys=["observation"], action_space="categorical"),
        loss_function=loss_function,
        double_dqn=double,
        delay_value=True,
        action_space="categorical",
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    target = QValueActor(learner.networks.target.network.layers, in_keys=["observation"], action_space="categorical")
    theirs.target_value_network_params.data.update_(TensorDict.from_module(target).data)
    expected = theirs(as_torchrl(batch))["loss"]
    expected.backward()
    found = means(learner, batch)["q_loss"]
    assert batch["done"].any() and batch["terminated"].any() and not torch.equal(batch["done"], batch["terminated"])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        gradients(learner.networks.online), gradients(theirs.value_network_params), atol=1e-6, rtol=1e-5
    )


def as_module(network):
    """A Q-network as TorchRL's losses take it."""
    return TensorDictModule(network.layers, ["observation"], ["action_value"])


def test_sac_is_torchrls():
    """Losses and gradients of actor, both Q-networks and a learned α are TorchRL's DiscreteSACLoss's."""
    batch = make_batch()
    learner = SAC(SACConfig(gamma=GAMMA, target_entropy=0.5, lmbda=0.0), VectorNetworks())
    for seed, follower in enumerate(learner.networks.target):
        moved(follower.network, seed)
    with torch.no_grad():
        learner.networks.learned_alpha.log.fill_(math.log(0.2))
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(copy.deepcopy(learner.networks.actor.layers), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
        ),
    )
    theirs = DiscreteSACLoss(
        actor,
        TensorDictModule(copy.deepcopy(learner.networks.online[0].layers), ["observation"], ["action_value"]),
        action_space="categorical",
        loss_function="l2",
        alpha_init=0.2,
        target_entropy=0.5 * math.log(ACTIONS),
        num_actions=ACTIONS,
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    stacked = [TensorDict.from_module(as_module(network)).data for network in learner.networks.online]
    theirs.qvalue_network_params.data.update_(torch.stack(stacked).contiguous())
    stacked = [TensorDict.from_module(as_module(follower.network)).data for follower in learner.networks.target]
    theirs.target_qvalue_network_params.data.update_(torch.stack(stacked).contiguous())
    expected = theirs(as_torchrl(batch))
    (expected["loss_actor"] + expected["loss_qvalue"] + expected["loss_alpha"]).backward()
    found = means(learner, batch)
    for name, other in dict(policy_loss="loss_actor", q_loss="loss_qvalue", alpha_loss="loss_alpha").items():
        torch.testing.assert_close(found[name], expected[other], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        gradients(learner.networks.actor), gradients(theirs.actor_network_params), atol=1e-6, rtol=1e-5
    )
    both = torch.cat([gradients(network) for network in learner.networks.online])
    theirs_both = [parameter.grad for parameter in theirs.qvalue_network_params.parameters()]
    theirs_both = torch.cat([grad[index].flatten() for index in range(2) for grad in theirs_both])
    torch.testing.assert_close(both.sort().values, theirs_both.sort().values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(learner.networks.learned_alpha.log.grad, theirs.log_alpha.grad, atol=1e-6, rtol=1e-5)
