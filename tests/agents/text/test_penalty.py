"""The penalty of a training run: each estimator in the learner's reward, and a β that follows the KL."""

from __future__ import annotations

import math

import pytest
import torch

from agents.objectives.actor_critic import add_penalized_reward
from agents.text.collector import make_controller
from agents.text.config import TextConfig
from agents.text.records import held_out_records
from agents.text.rollout import TextRollout, collect
from agents.trainer import Trainer
from tests.support.by_hand import perturb
from tests.support.learning import make_trainer
from textenv.generation import response_log_probs
from textenv.kl import AdaptiveKL, FixedKL
from textenv.state import TextState

ESTIMATORS = ["k1", "k2", "k3", "exact"]
BETA = 0.3  # kl_coef of the settings
ADAPTIVE = dict(kl_controller="adaptive", kl_target=0.5, kl_horizon=20)


def rollout_of(trainer: Trainer, tokens_per_pass: int = 1000) -> TextRollout:
    """Responses of an actor that has left the reference, under the trainer's own penalty."""
    perturb(trainer.algorithm.networks.actor, 0.03)
    generator = torch.Generator().manual_seed(3)
    prompts = trainer.collector.prompts.select([0, 1, 2, 3] * 2)
    return collect(
        trainer.collector.task,
        trainer.algorithm.networks.policy.model,
        prompts,
        generator,
        tokens_per_pass,
        trainer.collector.penalty(),
    )


def distributions(trainer: Trainer, data) -> tuple[list, list]:
    """Probabilities of the actor and of the reference, [B][R][V] in Python's own numbers, by full forwards."""
    width = data["input_ids"].shape[1] - data["mask"].shape[1]
    found = []
    for model in (trainer.algorithm.networks.policy.model, trainer.collector.task.reference.model):
        with torch.no_grad():
            logits = model(
                input_ids=data["input_ids"],
                attention_mask=data["attention_mask"].long(),
                position_ids=(data["attention_mask"].long().cumsum(1) - 1).clamp_min(0),
            ).logits[:, width - 1 : -1]
        found.append((logits.double() / 0.7).softmax(-1).tolist())
    return found[0], found[1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_penalized_reward_equals_the_loop(settings, estimator):
    """The learner's reward is the score at the end − β · estimate at each token, by a plain-Python loop over V."""
    trainer = make_trainer(settings, kl_estimator=estimator)
    data = rollout_of(trainer).data
    add_penalized_reward(data)
    actor, reference = distributions(trainer, data)
    lengths = data["mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        for t in range(data["mask"].shape[1]):
            wanted = 0.0
            if t < length:
                p, q, token = actor[row][t], reference[row][t], int(data["action"][row, t])
                d = math.log(p[token] / q[token])
                estimates = {"k1": d, "k2": d * d / 2, "k3": q[token] / p[token] - 1 + d}
                estimates["exact"] = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12)
                wanted = -BETA * estimates[estimator] + (float(data["score"][row]) if t == length - 1 else 0.0)
            # log-probabilities of float32 forwards in another order: 1e-5, and k3 and k2 grow with d
            assert float(data["reward"][row, t]) == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_exact_kl_under_masks(settings):
    """With action masks the exact KL is that of the distribution which was sampled from, over the allowed tokens."""
    trainer = make_trainer(settings | dict(action_mask="top_k:5"), kl_estimator="exact")
    data = rollout_of(trainer).data
    add_penalized_reward(data)
    actor, reference = distributions(trainer, data)
    row = int(data["mask"].sum(1).argmax())
    for t in range(int(data["mask"][row].sum())):
        kept = data["allowed_ids"][row, t][data["allowed_ids"][row, t] >= 0].tolist()
        assert data["allowed_inside"][row, t] and len(kept) == 5
        total = sum(actor[row][t][token] for token in kept)
        wanted = sum(
            p / total * math.log(p / total / q) for p, q in ((actor[row][t][k], reference[row][t][k]) for k in kept)
        )
        assert float(data["kl"][row, t]) == pytest.approx(wanted, abs=1e-4)
        assert wanted > 0.01


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("unit", ["token", "response"])
def test_the_trainer_moves_beta(settings, unit):
    """β is updated once a rollout from that rollout's own KL; each rollout is logged with the β that it paid."""
    trainer = make_trainer(settings, dict(epochs=1), kl_estimator="k2", kl_unit=unit, **ADAPTIVE)
    coef = trainer.collector.task.config.kl_coef
    for iteration in trainer.iterate():
        data, metrics = iteration.rollout.data, iteration.metrics
        assert metrics["kl_coef"] == pytest.approx(coef, rel=1e-12)
        ended = data["reward"].sum(1) - data["score"]
        torch.testing.assert_close(ended, -coef * data["kl"].sum(1), atol=1e-4, rtol=1e-4)
        kl = float(data["kl"].sum()) / (int(data["mask"].sum()) if unit == "token" else len(data))
        assert metrics[f"controller_kl_per_{unit}"] == pytest.approx(kl) and metrics[f"kl_target_per_{unit}"] == 0.5
        coef *= 1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 8 / 20
        assert trainer.collector.controller.coef == pytest.approx(coef, rel=1e-12)
    assert coef != BETA


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_a_fixed_beta_stays(settings):
    """By default β is the environment's kl_coef in every rollout, with nothing of a controller in the log."""
    trainer = make_trainer(settings, dict(epochs=1), iterations=2)
    for iteration in trainer.iterate():
        assert iteration.metrics["kl_coef"] == BETA
        assert not any("controller" in name or "target" in name for name in iteration.metrics)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_credit_shows_what_was_paid(settings, estimator):
    """The picture's penalties are those in the shaped reward: with the run's estimator and the run's present β."""
    trainer = make_trainer(settings, kl_estimator=estimator)
    perturb(trainer.algorithm.networks.actor, 0.03)
    trainer.collector.controller.coef = 2.0
    for record in held_out_records(trainer, trainer.collector.prompts, None):
        numbers = record.numbers
        penalties, values, errors = numbers["penalty"], numbers["value"], numbers["td_error"]
        scores = [0.0] * (len(values) - 1) + [record.score]
        assert numbers["score"] == pytest.approx(scores, abs=1e-6)
        for t, penalty in enumerate(penalties):
            assert numbers["reward"][t] == pytest.approx(scores[t] - penalty, abs=1e-5)
            # γ = 1: δ = reward − penalty + V' − V
            assert errors[t] == pytest.approx(scores[t] - penalty + [*values, 0.0][t + 1] - values[t], abs=1e-4)
        assert sum(penalties) > 0.1


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_without_a_penalty_the_kl_is_measured(settings):
    """With kl_coef=0 the learner's reward is the score, and the KL to the reference is still reported."""
    trainer = make_trainer(settings | dict(kl_coef=0), learning_rate=1e-2)
    iteration = list(trainer.iterate())[-1]
    data, task = iteration.rollout.data, trainer.collector.task
    torch.testing.assert_close(data["reward"].sum(1), data["score"])
    state = TextState.from_masks(data["input_ids"], data["attention_mask"], data["mask"])
    reference = response_log_probs(task.load_reference().model, state, task.config.temperature)
    by_hand = (data["action_log_prob"] - reference).where(data["mask"], 0.0).sum(1).mean()
    assert iteration.metrics["kl_per_response"] == pytest.approx(float(by_hand), abs=1e-3) and abs(by_hand) > 0.1
    assert iteration.metrics["kl_coef"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kl_estimator="k4"), "kl_estimator must be one of k1, k2, k3, exact, got 'k4'"),
        (dict(kl_controller="pid"), "kl_controller must be one of fixed, adaptive, got 'pid'"),
        (dict(kl_unit="episode"), "kl_unit must be one of token, response, got 'episode'"),
        (dict(kl_controller="adaptive"), "needs a kl_target above 0, in nats per response .*got None; 6 nats"),
        (dict(kl_controller="adaptive", kl_target=-1.0, kl_unit="token"), "in nats per token .*got -1.0"),
        (dict(kl_controller="adaptive", kl_target=math.nan), "kl_target must be a finite number or None, got nan"),
        (dict(ADAPTIVE, kl_horizon=0), "kl_horizon must be at least 1, got 0"),
    ],
)
def test_bad_settings(changes, message):
    """Bad settings of the penalty are refused before any work."""
    with pytest.raises(ValueError, match=message):
        TextConfig(**changes)


def test_controllers_by_name():
    """Names in the configuration give the controllers, β starting at the environment's kl_coef."""
    assert make_controller(TextConfig(), 0.2) == FixedKL(0.2)
    config = TextConfig(**ADAPTIVE, kl_unit="token")
    assert make_controller(config, 0.2) == AdaptiveKL(0.2, 0.5, 20, "token")
