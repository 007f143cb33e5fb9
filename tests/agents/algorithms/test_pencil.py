"""Two responses worked out by hand: rewards, advantages, losses and gradients that anyone can check with a pencil.

Response 1 has three tokens and response 2 has one. Discount γ = 1, GAE's λ = ½, penalty β = 0.2, clip ε = 0.2, value
clip 0.2. Every number that stands in padding, and the value of every terminal state, is 99 and must count nowhere.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.algorithms.grpo import GRPO, GRPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.objectives.advantages import estimate_advantages, response_ends, td_errors, token_weights, whiten
from agents.objectives.losses import clipped_surrogate, clipped_value_loss
from tests.support.learning import loss
from textenv.kl import environment_reward, k1, penalized_reward

X = 99.0  # what must never count
MASK = torch.tensor([[True, True, True], [True, False, False]])
LAST = torch.tensor([[False, False, True], [True, False, False]])

OLD_LOG_PROB = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, X, X]])
REFERENCE_LOG_PROB = torch.tensor([[-1.5, -1.0, -1.0], [-2.0, X, X]])
SCORE = torch.tensor([2.0, -1.0])
OLD_VALUE = torch.tensor([[-4.0, 0.6, 0.9, X], [-6.2, X, X, X]])  # of s_0 to s_R

PENALIZED_REWARD = torch.tensor([[-0.1, 0.2, 1.9], [-1.2, X, X]])
TD_ERROR = torch.tensor([[4.5, 0.5, 1.0], [5.0, 0.0, 0.0]])
ADVANTAGE = torch.tensor([[5.0, 1.0, 1.0], [5.0, 0.0, 0.0]])  # mean 3, deviation 2
WHITENED = torch.tensor([[1.0, -1.0, -1.0], [1.0, 0.0, 0.0]])
TARGET = torch.tensor([[1.0, 1.6, 1.9], [-1.2, 0.0, 0.0]])

RATIO = torch.tensor([[1.5, 0.5, 1.5], [0.9, X, X]])
POLICY_LOSS = torch.tensor([[-1.2, 0.8, 1.5], [-0.9, 0.0, 0.0]])  # mean 0.05
POLICY_GRADIENT = torch.tensor([[0.0, 0.0, 1.5], [-0.9, 0.0, 0.0]]) / 4  # of the mean, in log π
NEW_VALUE = torch.tensor([[-3.5, 0.5, 0.5], [-5.2, X, X]])
VALUE_LOSS = torch.tensor([[11.52, 0.605, 0.98], [11.52, 0.0, 0.0]])  # mean 6.15625
VALUE_GRADIENT = torch.tensor([[0.0, -1.1, -1.4], [0.0, 0.0, 0.0]]) / 4  # of the mean, in V


class Recited:
    """A distribution of which only the log-probabilities of the chosen tokens are known."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen

    def log_prob(self, action: Tensor) -> Tensor:
        return self.chosen


class Table(nn.Module):
    """A network that knows every output by heart."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs.clone())

    def distribution(self, batch: TensorDict) -> Recited:
        return Recited(self.outputs)

    def values(self, batch: TensorDict) -> Tensor:
        return self.outputs


class Tables:
    """The actor and the critic of the worked example, as they are after some updates."""

    discrete, group_size, alpha = True, 2, 0.2

    def actor(self) -> Table:
        # In padding the new log-probability is 99 + log 99, so that the ratio would be 99 there too.
        return Table(OLD_LOG_PROB + RATIO.log())

    def critic(self) -> Table:
        return Table(NEW_VALUE)

    def state_values(self, critic: nn.Module, data: TensorDict) -> Tensor:
        """What the critic said before the updates."""
        return OLD_VALUE.clone()


def make_rollout() -> TensorDict:
    """The two responses as a collector would give them, but for 99 in padding where it has zeros."""
    ends = response_ends(MASK)
    return TensorDict(
        {
            "mask": MASK,
            "done": ends.done,
            "terminated": ends.terminated,
            "action": torch.zeros(2, 3, dtype=torch.long),
            "action_log_prob": OLD_LOG_PROB,
            "reference_log_prob": REFERENCE_LOG_PROB,
            "score": SCORE,
            "kl_coef": torch.full((2,), 0.2),
            "step_score": SCORE[:, None].where(LAST, 0.0).where(MASK, X),
            "kl": k1(OLD_LOG_PROB, REFERENCE_LOG_PROB).where(MASK, X),
        },
        batch_size=[2],
    )


def step(algorithm: Any, batch: TensorDict) -> tuple[dict[str, float], dict[str, float]]:
    """Every loss term's mean as the trainer takes it, leaving gradients behind, and the diagnostics' sums."""
    weight = algorithm.step_weights(batch["mask"])
    terms, diagnostics = loss(algorithm, batch)
    means = {name: (term * weight).sum() for name, term in terms.items()}
    sum(means.values()).backward()
    return {name: float(mean.detach()) for name, mean in means.items()}, {k: float(v) for k, v in diagnostics.items()}


def log_prob_gradient(algorithm: Any) -> Tensor:
    """The gradient in log π of every chosen token, [B, R]."""
    return algorithm.networks.policy.outputs.grad


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float32."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_penalized_reward():
    """Every token pays β (log π − log π_ref), and the last one earns the score."""
    token_score = SCORE[:, None].where(LAST, 0.0)
    found = penalized_reward(token_score, k1(OLD_LOG_PROB, REFERENCE_LOG_PROB), 0.2)
    assert_near(found[MASK], PENALIZED_REWARD[MASK])
    paid = environment_reward(token_score, REFERENCE_LOG_PROB, 0.2)  # the environment's half; the policy's is the rest
    assert_near((paid - 0.2 * OLD_LOG_PROB)[MASK], PENALIZED_REWARD[MASK])


def test_advantages():
    """TD errors, GAE and value targets with V(s_T) = 0, and whitening over the four real tokens."""
    ends = response_ends(MASK)
    assert torch.equal(ends.done, LAST) and torch.equal(ends.terminated, LAST)
    assert_near(td_errors(PENALIZED_REWARD, OLD_VALUE, ends, 1.0), TD_ERROR)
    advantage, target = estimate_advantages(PENALIZED_REWARD, OLD_VALUE, ends, 1.0, 0.5)
    assert_near(advantage, ADVANTAGE)
    assert_near(target, TARGET)
    assert_near(whiten(advantage.where(MASK, X), MASK), WHITENED)


def test_ppo_prepares_advantages():
    """PPO's `prepare` writes the same advantages and value targets, and the old values with 0 in padding."""
    rollout = make_rollout()
    PPO(PPOConfig(gamma=1.0, lmbda=0.5), Tables()).prepare(rollout)
    for key, expected in (
        ("state_value", OLD_VALUE[:, :3].where(MASK, 0.0)),
        ("td_error", TD_ERROR),
        ("raw_advantage", ADVANTAGE),
        ("advantage", WHITENED),
        ("value_target", TARGET),
    ):
        assert_near(rollout[key], expected)


def test_losses():
    """Each token's clipped policy loss and clipped value loss, the ½ included."""
    assert_near(clipped_surrogate(RATIO, WHITENED, 0.2), POLICY_LOSS)
    found = clipped_value_loss(NEW_VALUE, OLD_VALUE[:, :3], TARGET, 0.2)
    assert_near(found[MASK], VALUE_LOSS[MASK])
    weight = token_weights(MASK)
    assert_near(weight, MASK / 4)
    assert float((weight * POLICY_LOSS).sum()) == pytest.approx(0.05)
    assert float((weight * found).sum()) == pytest.approx(6.15625)


def test_ppo_losses_and_gradients():
    """PPO's mean losses, and their gradients in each log π and each V: 0 where a clip acts, and 0 in padding."""
    rollout, algorithm = make_rollout(), PPO(PPOConfig(gamma=1.0, lmbda=0.5, clip=0.2, value_clip=0.2), Tables())
    algorithm.prepare(rollout)
    for key in ("advantage", "value_target", "state_value"):  # the loss reads no padding either
        rollout[key] = rollout[key].where(MASK, X)
    means, diagnostics = step(algorithm, rollout)
    assert means == dict(policy_loss=pytest.approx(0.05, abs=1e-6), value_loss=pytest.approx(6.15625))
    assert_near(log_prob_gradient(algorithm), POLICY_GRADIENT)
    assert_near(algorithm.networks.critic.outputs.grad, VALUE_GRADIENT)
    # Ratios 1.5, 0.5 and 1.5 are outside 1 ± 0.2. ρ − 1 − log ρ is 0.09453 twice, 0.19315 and 0.00536.
    assert diagnostics == dict(clip_fraction=3.0, approx_kl=pytest.approx(0.387577, abs=1e-5))


@pytest.mark.parametrize("at_start", [True, False])
def test_rloo(at_start):
    """Returns less the penalty are 2 and −1.2, so advantages are ±3.2, and the mean loss is −1.6 at ratios of 1.

    At the ratios of the table the mean is the same: −3.84, −1.6 and −3.84 against 2.88. The gradient is not.
    """
    rollout, algorithm = make_rollout(), RLOO(RLOOConfig(clip=0.2), Tables())
    algorithm.prepare(rollout)
    assert_near(rollout["advantage"], torch.tensor([[3.2, 3.2, 3.2], [-3.2, 0.0, 0.0]]))
    if at_start:
        algorithm.networks.policy.outputs.data = OLD_LOG_PROB.clone()
    means, _ = step(algorithm, rollout)
    assert means == dict(policy_loss=pytest.approx(-1.6))
    expected = [[-0.8, -0.8, -0.8], [0.8, 0.0, 0.0]] if at_start else [[0.0, -0.4, 0.0], [0.72, 0.0, 0.0]]
    assert_near(log_prob_gradient(algorithm), torch.tensor(expected))


@pytest.mark.parametrize(("normalize", "advantage"), [(False, 1.5), (True, math.sqrt(0.5))])
def test_grpo_advantages(normalize, advantage):
    """Scores alone, 2 and −1: ±1.5 from their mean, and ±√½ in units of their deviation 3/√2."""
    rollout, algorithm = make_rollout(), GRPO(GRPOConfig(normalize=normalize), Tables())
    algorithm.prepare(rollout)
    assert_near(rollout["advantage"], advantage * torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("aggregation", "policy_loss", "kl_loss", "shares"),
    [("sequence", -0.05, 0.142441, [1 / 6, 1 / 2]), ("token", -0.75, 0.183322, [1 / 4, 1 / 4])],
)
def test_grpo_losses(aggregation, policy_loss, kl_loss, shares):
    """Means over responses or over tokens, the penalty β · k3 beside the policy loss, and the gradients of both.

    With advantages ±1.5 the policy losses are −1.8, −0.75, −1.8 and 1.35. At the new policy k3 = e^−d − 1 + d is 0.30982,
    2.74342, 0.30982 and 0.30339, with slopes 1 − e^−d of 0.59565, −4.43656, 0.59565 and 0.59125.
    """
    rollout = make_rollout()
    algorithm = GRPO(GRPOConfig(clip=0.2, normalize=False, aggregation=aggregation, kl_loss="k3"), Tables())
    algorithm.prepare(rollout)
    means, _ = step(algorithm, rollout)
    assert means == dict(policy_loss=pytest.approx(policy_loss, abs=1e-6), kl_loss=pytest.approx(kl_loss, abs=1e-5))
    slopes = torch.tensor([[0.0, -0.75, 0.0], [1.35, 0.0, 0.0]])
    slopes += 0.2 * torch.tensor([[0.595646, -4.436564, 0.595646], [0.591245, 0.0, 0.0]])
    assert_near(log_prob_gradient(algorithm), torch.tensor(shares)[:, None] * slopes)
