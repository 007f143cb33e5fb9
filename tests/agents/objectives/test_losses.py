"""The losses of PPO, A2C and REINFORCE: equal to TorchRL's, and by hand where TorchRL has none."""

from __future__ import annotations

import math

import pytest
import torch
import torchrl
from packaging.version import Version
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss

from agents.objectives.losses import (
    clipped_surrogate,
    clipped_terms,
    clipped_value_loss,
    distance,
    policy_gradient,
    value_loss,
)


def networks():
    torch.manual_seed(0)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Linear(3, 5), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        ),
    )
    return actor, TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])


def log_prob_of(actor, batch: TensorDict) -> torch.Tensor:
    """Log-probability of the actions taken, [B, R]."""
    return torch.distributions.Categorical(logits=actor[0].module(batch["observation"])).log_prob(batch["action"])


def as_torchrl(batch: TensorDict) -> TensorDict:
    """The same batch with the trailing dimension that TorchRL's losses expect of values and advantages."""
    values = {key: batch[key][..., None] for key in ("advantage", "state_value", "value_target")}
    return TensorDict({**batch, **values}, batch_size=[6])


def make_batch() -> TensorDict:
    """Steps whose recorded policy is another than the present one, so that clips act. [B, R] = [6, 4]."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return TensorDict(
        {
            "observation": normal(6, 4, 3),
            "action": torch.randint(5, (6, 4), generator=generator),
            "action_log_prob": -1.6 + 0.5 * normal(6, 4),
            "advantage": normal(6, 4),
            "state_value": normal(6, 4),
            "value_target": normal(6, 4),
            "mask": torch.rand(6, 4, generator=generator) < 0.7,
        },
        batch_size=[6],
    )


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_equal_to_torchrl(value_clip):
    """Policy loss, value loss, clip fraction and every gradient are ClipPPOLoss's."""
    found = []
    for ours in (True, False):
        (actor, critic), batch = networks(), make_batch()
        if ours:
            log_ratio = log_prob_of(actor, batch) - batch["action_log_prob"]
            policy = clipped_surrogate(log_ratio.exp(), batch["advantage"], 0.2)
            value, target = critic.module(batch["observation"])[..., 0], batch["value_target"]
            worth = (
                value_loss(value, target)
                if value_clip is None
                else clipped_value_loss(value, batch["state_value"], target, value_clip)
            )
            outside = distance(log_ratio, log_ratio.exp(), 0.2)["clip_fraction"] / 24
        else:
            objective = ClipPPOLoss(
                actor,
                critic,
                clip_epsilon=0.2,
                clip_value=value_clip,
                critic_coeff=0.5,
                loss_critic_type="l2",
                entropy_bonus=False,
                functional=False,
                reduction="none",
            )
            objective.loss_mask_key = None
            out = objective(as_torchrl(batch))
            policy, worth, outside = out["loss_objective"], out["loss_critic"], out["clip_fraction"]
        (policy.sum() + worth.sum()).backward()
        gradients = [parameter.grad for network in (actor, critic) for parameter in network.parameters()]
        found.append([policy, worth, outside, *gradients])
    assert 0 < float(found[0][2]) < 1
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


OF_0_14_1 = pytest.mark.skipif(
    Version(torchrl.__version__) < Version("0.14.1"), reason="older ReinforceLoss samples actions anew"
)


@pytest.mark.parametrize("learner", [A2CLoss, pytest.param(ReinforceLoss, marks=OF_0_14_1)])
def test_policy_gradient_equals_torchrl(learner):
    """Policy loss, value loss and every gradient of A2C and REINFORCE are those of A2CLoss and ReinforceLoss."""
    results = []
    for ours in (True, False):
        (actor, critic), batch = networks(), make_batch()
        if ours:
            policy = policy_gradient(log_prob_of(actor, batch), batch["advantage"])
            value = value_loss(critic.module(batch["observation"])[..., 0], batch["value_target"])
        else:
            options = dict(entropy_bonus=False, critic_coeff=0.5) if learner is A2CLoss else {}
            objective = learner(actor, critic, loss_critic_type="l2", functional=False, reduction="none", **options)
            objective.loss_mask_key = None
            out = objective(as_torchrl(batch))
            if learner is A2CLoss:
                policy, value = out["loss_objective"], out["loss_critic"]
            else:
                policy, value = out["loss_actor"], 0.5 * out["loss_value"]
        (policy.sum() + value.sum()).backward()
        gradients = [parameter.grad for network in (actor, critic) for parameter in network.parameters()]
        results.append([policy.flatten(), value.flatten(), *gradients])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_distance_by_hand():
    """ρ − 1 − log ρ and the steps outside the clip, over valid steps alone."""
    logits = torch.tensor([[[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]]).log()
    batch = TensorDict(
        {
            "action": torch.tensor([[0, 1, 0]]),
            "action_log_prob": torch.tensor([[0.4, 0.5, 0.9]]).log(),
            "advantage": torch.ones(1, 3),
            "mask": torch.tensor([[True, True, False]]),
        },
        batch_size=[1],
    )
    _, found = clipped_terms(torch.distributions.Categorical(logits=logits), batch, 0.2, "none")
    assert float(found["approx_kl"]) == pytest.approx(1.5 - 1 - 0.4054651, rel=1e-4)
    assert float(found["clip_fraction"]) == 1.0


@pytest.mark.parametrize("log_ratio", [-200.0, -90.0, -19.0, 19.0, 90.0, 200.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("kl_loss", ["none", "k2", "k3"])
def test_far_policies_have_finite_losses_and_gradients(log_ratio, advantage, kl_loss):
    """Log-ratios count up to 20, to the old policy and to the reference; up to there losses and slopes are exact."""
    logits = torch.tensor([[[0.0, -log_ratio]]], requires_grad=True)  # log π of action 0: about min(log_ratio, 0)
    distribution = torch.distributions.Categorical(logits=logits)
    log_prob = distribution.log_prob(torch.zeros(1, 1, dtype=torch.long))
    batch = TensorDict(
        {
            "action": torch.zeros(1, 1, dtype=torch.long),
            "action_log_prob": log_prob.detach() - log_ratio,
            "reference_log_prob": log_prob.detach() + log_ratio,  # d = −log_ratio
            "advantage": torch.full((1, 1), advantage),
            "mask": torch.ones(1, 1, dtype=torch.bool),
            "kl_coef": torch.ones(1),
        },
        batch_size=[1],
    )
    terms, diagnostics = clipped_terms(distribution, batch, 0.2, kl_loss)
    sum(term.sum() for term in terms.values()).backward()
    assert all(bool(value.isfinite().all()) for value in (*terms.values(), *diagnostics.values(), logits.grad))
    ratio = math.exp(min(log_ratio, 20.0))
    clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert float(terms["policy_loss"].detach()) == pytest.approx(-clipped, rel=1e-5, abs=1e-6)
    if kl_loss == "k3":
        d = max(-log_ratio, -20.0)
        assert float(terms["kl_loss"].detach()) == pytest.approx(math.exp(-d) - 1 + d, rel=1e-5)
    if kl_loss == "k2":
        assert float(terms["kl_loss"].detach()) == pytest.approx(0.5 * log_ratio**2, rel=1e-5)
