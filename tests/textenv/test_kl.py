"""Estimators of the KL by hand, their means, their gradients, and the controllers of the penalty's weight."""

from __future__ import annotations

import math

import pytest
import torch

from textenv.kl import (
    ESTIMATORS,
    AdaptiveKL,
    FixedKL,
    adapted,
    environment_reward,
    exact_kl,
    k1,
    k2,
    k3,
    penalized_reward,
)

# ---- rewards


def test_rewards_by_hand():
    """Score 2 at the last of three tokens; β = ½. The environment pays β log π_ref, the learner loses β KL."""
    score = torch.tensor([[0.0, 0.0, 2.0]])
    log_prob, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    paid = environment_reward(score, reference, 0.5)
    assert paid.tolist() == [[-0.75, -0.5, 0.5]]
    penalized = penalized_reward(score, k1(log_prob, reference), 0.5)
    assert penalized.tolist() == [[-0.25, 0.5, 2.0]]
    assert torch.equal(penalized, paid - 0.5 * log_prob)


def test_each_row_may_have_its_own_coefficient():
    """β as [B, 1] counts for all tokens of its row."""
    kl = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert penalized_reward(torch.ones(2, 2), kl, torch.tensor([[0.0], [2.0]])).tolist() == [[1, 1], [-1, -3]]


# ---- estimators


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (k1, [math.log(2), -math.log(2), 0.0]),
        (k2, [0.5 * math.log(2) ** 2, 0.5 * math.log(2) ** 2, 0.0]),
        (k3, [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0.0]),  # exp(−d) is ½, 2 and 1
    ],
)
def test_estimators_by_hand(estimate, expected):
    """Tokens with π/π_ref = 2, ½ and 1."""
    log_prob = torch.tensor([0.5, 0.25, 0.25]).double().log()
    reference = torch.tensor([0.25, 0.5, 0.25]).double().log()
    assert estimate(log_prob, reference).tolist() == pytest.approx(expected, abs=1e-12)


def test_k3_is_never_negative_and_keeps_small_numbers():
    """k3 ≥ 0 everywhere, and near the reference it is ½ d² and not float32's rounding of 1 − 1."""
    difference = torch.linspace(-20, 20, 4001)
    values = k3(difference, torch.zeros(4001))
    assert (values >= 0).all() and values.argmin() == 2000
    # below 1e-3 float32 keeps no digit of exp(−d) − 1 + d; with expm1 the error is that of d, 6e-8 of it
    small = torch.tensor([1e-2, -1e-2])
    torch.testing.assert_close(k3(small, torch.zeros(2)), 0.5 * small.square(), rtol=5e-3, atol=0)


def make_logits(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy and of a reference a little way off."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(*shape, generator=generator)
    return reference + 0.5 * torch.randn(*shape, generator=generator), reference


def test_exact_kl_equals_the_loop():
    """Σ p (log p − log q) over the vocabulary, with the temperature in both; 0 for equal distributions."""
    logits, reference = make_logits(2, 3, 7)
    found = exact_kl(logits, reference, 0.7)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    for row in range(2):
        for t in range(3):
            weights = [[math.exp(float(x) / 0.7) for x in source[row, t]] for source in (logits, reference)]
            p, q = ([w / sum(some) for w in some] for some in weights)
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-6)
    assert not exact_kl(logits, logits, 0.7).any()


def test_exact_kl_of_filtered_distributions():
    """Tokens that π cannot choose count nothing, in the gradient neither; those that only π can make it infinite."""
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    found = exact_kl(logits, torch.tensor([0.0, 0.0, 0.0]), 1.0)
    assert float(found.detach()) == pytest.approx(math.log(3 / 2), abs=1e-6)
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    both = torch.tensor([0.0, -math.inf])
    assert float(exact_kl(both, both, 1.0)) == 0.0
    assert float(exact_kl(torch.zeros(2), both, 1.0)) == math.inf


def test_means_where_tokens_are_forbidden():
    """Where π may not choose what π_ref may, k1's mean is still the KL; k3's is less, by the mass π_ref has there."""
    logits, reference = (one[0].double() for one in make_logits(1, 20))
    logits[12:] = -math.inf
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    mean = {name: float((p.exp()[:12] * estimate(p[:12], q[:12])).sum()) for name, estimate in ESTIMATORS.items()}
    exact = float(exact_kl(logits, reference, 1.0))
    assert mean["k1"] == pytest.approx(exact, abs=1e-6)
    assert mean["k3"] == pytest.approx(exact - float(q[12:].exp().sum()), abs=1e-6)


def test_means_over_samples():
    """Over 400,000 samples the means of k1 and k3 are the exact KL; k2's is not; k3 varies least near the reference."""
    logits, reference = make_logits(1, 50)
    p, q = logits[0].double().log_softmax(-1), reference[0].double().log_softmax(-1)
    exact = float(exact_kl(logits, reference, 1.0))
    tokens = torch.multinomial(p.exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, estimate in ESTIMATORS.items():
        values = estimate(p[tokens], q[tokens])
        errors[name] = abs(float(values.mean()) - exact) / float(values.std() / len(values) ** 0.5)
    assert exact > 0.05
    assert errors["k1"] < 4 and errors["k3"] < 4  # standard errors: by chance once in 16,000
    assert errors["k2"] > 8
    assert float(k3(p, q)[tokens].std()) < 0.7 * float(k1(p, q)[tokens].std())


# ---- what the estimators' gradients are (module docstring of kl.py), over every token, so without chance


def gradient(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits)[0]


@pytest.fixture
def near():
    """Log-probabilities of a policy, differentiable in its logits, and of a reference, V = 9."""
    logits, reference = (one[0].double() for one in make_logits(1, 9, seed=3))
    logits.requires_grad_(True)
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    reverse = gradient(logits, (p.exp() * (p - q)).sum())  # of KL(π‖π_ref)
    p = logits.log_softmax(-1)
    forward = gradient(logits, (q.exp() * (q - p)).sum())  # of KL(π_ref‖π)
    return logits, q, reverse, forward


def test_gradients_as_part_of_the_reward(near):
    """E[∇ log π · k]: k1 gives ∇KL(π‖π_ref), k3 that less ∇KL(π_ref‖π), the exact KL of a state nothing."""
    logits, q, reverse, forward = near
    found = {}
    constants = {name: estimate(logits.log_softmax(-1), q).detach() for name, estimate in ESTIMATORS.items()}
    constants["exact"] = torch.full((9,), 0.3).double()
    for name, k in constants.items():
        p = logits.log_softmax(-1)
        found[name] = gradient(logits, (p.exp().detach() * p * k).sum())
    torch.testing.assert_close(found["k1"], reverse)
    torch.testing.assert_close(found["k3"], reverse - forward)
    torch.testing.assert_close(found["exact"], torch.zeros(9).double(), atol=1e-12, rtol=0)
    assert (found["k2"] - reverse).norm() > 0.2 * reverse.norm()
    assert found["k3"].norm() < 0.5 * reverse.norm()


def test_gradients_as_a_term_of_the_loss(near):
    """E[∇k]: k1 gives zero, k2 ∇KL(π‖π_ref), k3 ∇KL(π_ref‖π), the exact KL its own."""
    logits, q, reverse, forward = near
    expected = {"k1": torch.zeros(9).double(), "k2": reverse, "k3": forward}
    for name, estimate in ESTIMATORS.items():
        p = logits.log_softmax(-1)
        found = gradient(logits, (p.exp().detach() * estimate(p, q)).sum())
        torch.testing.assert_close(found, expected[name], atol=1e-12, rtol=1e-7)
    exact = gradient(logits, exact_kl(logits, q, 1.0))
    torch.testing.assert_close(exact, reverse, atol=1e-6, rtol=1e-5)


# ---- controllers


@pytest.mark.parametrize(
    ("kl", "responses", "expected"),
    [
        (6.3, 1000, 0.1 * (1 + 0.05 * 0.1)),  # 5% above the target
        (60.0, 1000, 0.1 * (1 + 0.2 * 0.1)),  # far above: the error is cut to 20%
        (-1.0, 1000, 0.1 * (1 - 0.2 * 0.1)),  # an estimate may be negative
        (6.0, 1000, 0.1),
        (60.0, 50_000, 0.1 * 1.2),  # more responses than the horizon: a fifth, and β never turns negative
        (0.0, 50_000, 0.1 * 0.8),
        (math.inf, 1000, 0.1 * 1.02),
    ],
)
def test_adapted_by_hand(kl, responses, expected):
    """β (1 + clip(KL/target − 1, ±0.2) · n / horizon)."""
    assert adapted(0.1, kl, 6.0, 10_000, responses) == pytest.approx(expected, rel=1e-12)


def test_units():
    """Per token the KL is the mean over tokens, per response the sum over each; the log names the unit."""
    token, response = AdaptiveKL(0.1, 0.1, 100, "token"), AdaptiveKL(0.1, 6.0, 100, "response")
    # 10 responses of 20 tokens each, 0.11 nats a token, 2.2 nats a response
    assert token.update(22.0, 200, 10) == pytest.approx({"controller_kl_per_token": 0.11, "kl_target_per_token": 0.1})
    assert response.update(22.0, 200, 10) == {"controller_kl_per_response": 2.2, "kl_target_per_response": 6.0}
    assert token.coef == pytest.approx(0.1 * (1 + 0.1 * 0.1)) and response.coef == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_adaptive_finds_its_target():
    """Where the KL falls as β grows, KL = 1/β, β comes to 1/target, from above and from below."""
    for start in (0.01, 3.0):
        controller = AdaptiveKL(start, 4.0, 100, "response")
        for _ in range(400):
            controller.update(64 / controller.coef, 640, 64)
        assert controller.coef == pytest.approx(0.25, rel=1e-3)


def lagging_policy(controller: AdaptiveKL, kl: float, updates: int) -> list[float]:
    """What training makes of β, much simplified: the KL after each update, in the controller's unit.

    The KL goes a tenth of the way towards 0.05 / (β + 0.01) nats a token in each iteration of 128 responses, whose
    length falls from 20 tokens to 16 over the first fifty. kl: nats a token to begin with.
    """
    found = []
    for update in range(updates):
        tokens = 128 * (20 - 4 * min(update / 50, 1))
        kl += 0.1 * (0.05 / (controller.coef + 0.01) - kl)
        measured = controller.update(kl * tokens, int(tokens), 128)
        found.append(measured[f"controller_kl_per_{controller.unit}"])
    return found


@pytest.mark.parametrize(("horizon", "settled"), [(1_280, 200), (10_000, 1_300)])
@pytest.mark.parametrize(("unit", "target", "wanted"), [("token", 0.3, 0.05 / 0.3), ("response", 6.0, 0.05 * 16 / 6)])
@pytest.mark.parametrize("factor", [1 / 20, 20])
@pytest.mark.parametrize("kl", [0.0, 3.0])
def test_adaptive_holds_its_target(unit, target, wanted, factor, kl, horizon, settled):
    """Within `settled` updates the KL of a policy that lags is within 5% of the target, and stays there.

    β begins 20 times too small or too large, the KL at nothing or at ten times the target. At a fifth of
    128 / horizon an update, a factor of 20 alone takes ln 20 · 5 · horizon / 128 updates: 150 and 1,170.
    """
    controller = AdaptiveKL(factor * (wanted - 0.01), target, horizon, unit)
    held = lagging_policy(controller, kl, 2 * settled)[settled:]
    assert held == pytest.approx([target] * settled, rel=0.05)
    assert held[-1] == pytest.approx(target, rel=1e-3) and controller.coef == pytest.approx(wanted - 0.01, rel=1e-3)


def test_controllers_go_on_where_they_stopped():
    """state_dict and load_state_dict carry β, to the bit; a fixed β never moves and logs nothing."""
    first, second = AdaptiveKL(0.1, 6.0, 100, "response"), AdaptiveKL(0.5, 6.0, 100, "response")
    first.update(70.0, 90, 10)
    second.load_state_dict(first.state_dict())
    assert second.coef == first.coef != 0.1
    fixed = FixedKL(0.1)
    assert fixed.update(70.0, 90, 10) == {} and fixed.coef == 0.1
    fixed.load_state_dict({"coef": 0.2})
    assert fixed.state_dict() == {"coef": 0.2}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FixedKL(-0.1), "coef must be 0 or more, got -0.1; 0 means no penalty"),
        (lambda: FixedKL(math.nan), "coef must be a finite number, got nan"),
        (lambda: FixedKL("0.1"), "coef must be a finite number, got '0.1'"),  # type: ignore[arg-type]
        (lambda: AdaptiveKL(0.0, 6, 100, "response"), "coef must be above 0, got 0.0; .*use FixedKL"),
        (lambda: AdaptiveKL(0.1, -6, 100, "response"), "target must be above 0, got -6"),
        (lambda: AdaptiveKL(0.1, 6, math.inf, "response"), "horizon must be a finite number, got inf"),
        (lambda: AdaptiveKL(0.1, 6, 0, "response"), "horizon must be above 0, got 0"),
        (
            lambda: AdaptiveKL(0.1, 6, 100, "episode"),
            "unit must be 'token' or 'response', got 'episode'; 6 nats per response",
        ),
        (lambda: AdaptiveKL(0.1, 6, 100, "token").update(math.nan, 10, 1), "measured KL is NaN.*check the log-prob"),
    ],
)
def test_bad_controllers(make, says):
    """Bad arguments are refused with what was got and the remedy."""
    with pytest.raises(ValueError, match=says):
        make()
