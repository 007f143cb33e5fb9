"""The on-policy learners: losses and gradients against hand-written ones, and what padding and splitting may not do."""

from __future__ import annotations

import math

import pytest
import torch

from agents.algorithms.registry import ALGORITHMS
from agents.objectives.losses import kl_penalty
from tests.support import tiny
from tests.support.by_hand import TEMPERATURE, gradients, perturb, whole_loss
from tests.support.learning import loss, losses, make_rollout, make_trainer, same

ON_POLICY = [name for name, (_, learner) in ALGORITHMS.items() if learner.on_policy]
WITHOUT_CRITIC = ["rloo", "grpo"]


@pytest.fixture
def task(folders) -> dict:
    """Arguments of `gym.make` for a small task with ragged prompts and groups."""
    return dict(
        reference=folders["gpt2"],
        reward=folders["gpt2_reward"],
        prompts=tiny.PROMPTS,
        kl_coef=0.3,
        max_prompt_tokens=16,
        max_new_tokens=12,
        temperature=TEMPERATURE,
        group_size=4,
        device="cpu",
    )


def moved(task: dict, name: str, settings: dict | None = None, **changes):
    """A trainer whose networks are no longer those that wrote its rollout, and the rollout."""
    trainer = make_trainer(task, settings, learner=name, **changes)
    perturb(trainer.algorithm.networks.actor)  # away from the reference, or no reward would have a penalty in it
    data = make_rollout(trainer).data
    assert data["kl"].abs().max() > 1e-3
    assert len(set(data["mask"].sum(1).tolist())) > 1  # ragged, or the tests would prove little
    for network in trainer.algorithm.networks.trained.values():
        perturb(network)
    return trainer, data


def all_gradients(trainer) -> torch.Tensor:
    return torch.cat([gradients(network) for network in trainer.algorithm.networks.trained.values()])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo", dict(clip=0.1, value_clip=0.05)),
        ("ppo", dict(entropy_coef=0.05, gamma=0.9, lmbda=0.5, whiten=False)),
        ("ppo", dict(kl_loss="k3", value_clip=0.0)),
        ("a2c", dict()),
        ("a2c", dict(entropy_coef=0.05, gamma=0.9, lmbda=0.5, whiten=False)),
        ("reinforce", dict()),
        ("reinforce", dict(gamma=0.9, whiten=False)),
        ("rloo", dict(clip=0.1)),
        ("rloo", dict(kl_loss="k2")),
        ("grpo", dict(clip=0.1)),
        ("grpo", dict(aggregation="token", normalize=False)),
        ("grpo", dict(kl_loss="none")),
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_loop(task, name, settings):
    """Each loss, and its gradient in every weight, is that of its paper, from raw rewards on, by a plain loop."""
    trainer, data = moved(task, name, settings)
    found = sum(losses(trainer, data).values())
    found.backward()
    got = all_gradients(trainer)
    trainer.optimizer.zero_grad()
    expected = whole_loss(trainer, data)
    expected.backward()
    wanted = all_gradients(trainer)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert wanted.abs().max() > 1e-3
    if "clip" in settings:
        assert loss(trainer.algorithm, data)[1]["clip_fraction"] > 0  # the clip is at work, or this would not see it
    # float32 sums in another order: a few roundings of the largest entry
    torch.testing.assert_close(got / wanted.abs().max(), wanted / wanted.abs().max(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"), [(name, {}) for name in ON_POLICY] + [("grpo", dict(aggregation="token"))], ids=str
)
def test_gradients_do_not_depend_on_micro_batches(task, name, settings):
    """One optimizer step is the same mean however its ragged rows are split into micro-batches."""
    found = {}
    for tokens in (1000, 45):
        trainer, data = moved(task, name, settings, minibatch_size=8, micro_batch_tokens=tokens, max_grad_norm=1e9)
        trainer._backward(data)
        found[tokens] = all_gradients(trainer)
    scale = found[1000].abs().max()
    torch.testing.assert_close(found[45] / scale, found[1000] / scale, atol=1e-5, rtol=0)  # float32 sums, as above


@pytest.mark.parametrize("name", ON_POLICY)
def test_padding_changes_no_loss_and_no_gradient(task, name):
    """Numbers of 1e9, infinity or NaN in padding, and other ids, change nothing, to the bit."""
    trainer, clean = moved(task, name)
    outside, results = ~clean["mask"], []
    for spoil in (None, 1e9, math.inf, math.nan):
        batch = clean.clone()
        if spoil is not None:
            for key in {"step_score", "kl", "reference_log_prob", "action_log_prob"}:
                batch[key][outside] = spoil
            batch["input_ids"][~batch["attention_mask"]] = 7
        trainer.algorithm.prepare(batch)
        if spoil is not None:
            for key in {"advantage", "value_target", "state_value", "reward"} & set(batch.keys()):
                batch[key][outside] = spoil
        trainer.optimizer.zero_grad()
        terms = losses(trainer, batch)
        sum(terms.values()).backward()
        results.append([*terms.values(), all_gradients(trainer)])
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ON_POLICY)
def test_terms_of_single_steps_keep_their_shape(task, name):
    """Where a row is one step, as in environments without text, every term is still [B, R] = [N, 1]."""
    trainer = make_trainer(task | dict(max_new_tokens=1), learner=name)
    data = make_rollout(trainer).data
    assert data["mask"].shape == (8, 1)
    assert {term.shape for term in loss(trainer.algorithm, data)[0].values()} == {(8, 1)}


@pytest.mark.parametrize(("name", "settings"), [("ppo", dict(kl_loss="k3")), ("rloo", {}), ("grpo", {})], ids=str)
def test_one_forward_pass_of_the_actor(task, name, settings):
    """The KL as a term of the loss costs no second forward pass."""
    trainer, data = moved(task, name, settings)
    loss(trainer.algorithm, data)  # the first time, the model's head is looked at
    calls = []
    trainer.algorithm.networks.policy.model.register_forward_hook(lambda *_: calls.append(1))
    loss(trainer.algorithm, data)
    assert len(calls) == 1


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_penalty_by_hand(estimator):
    """β·k and its gradient: β d for k2, β (1 − e^−d) for k3; each row has its own β, and padding has none."""
    log_prob = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    reference, mask = torch.tensor([[-1.5, -1.0], [-2.5, 1e9]]), torch.tensor([[True, True], [True, False]])
    beta, d = torch.tensor([0.1, 0.2]), torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    value = 0.5 * d**2 if estimator == "k2" else (-d).exp() - 1 + d
    slope = d if estimator == "k2" else 1 - (-d).exp()
    found = kl_penalty(log_prob, reference, beta, mask, estimator=estimator)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), beta[:, None] * value)
    torch.testing.assert_close(log_prob.grad, beta[:, None] * slope)


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_without_a_penalty_the_loss_has_no_kl(task, name):
    """kl_coef=0 has no penalty, so a KL in the loss is left out, and the reward is the score alone."""
    trainer = make_trainer(task | dict(kl_coef=0), dict(kl_loss="k3"), learner=name)
    data = make_rollout(trainer).data
    assert set(losses(trainer, data)) <= {"policy_loss", "value_loss"}
    total = data["reward"].sum(1)
    torch.testing.assert_close(total, data["score"])


def test_aggregations_differ(task):
    """By sequence short responses weigh as much as long ones, by token less: other losses on ragged rows."""
    found = {}
    for aggregation in ("sequence", "token"):
        trainer, data = moved(task, "grpo", dict(aggregation=aggregation))
        weight, lengths = trainer.algorithm.step_weights(data["mask"]), data["mask"].sum(1)
        shares = weight.sum(1)
        expected = torch.full((8,), 1 / 8) if aggregation == "sequence" else lengths / lengths.sum()
        torch.testing.assert_close(shares, expected)
        found[aggregation] = losses(trainer, data)["policy_loss"].item()
    assert found["sequence"] != pytest.approx(found["token"], rel=1e-3)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_token_of_a_response_gets_its_advantage(task, name):
    """Advantages are constant over a response, sum to 0 over a group, and there is no critic."""
    trainer = make_trainer(task, learner=name)
    data = make_rollout(trainer).data
    advantage, mask = data["advantage"], data["mask"]
    torch.testing.assert_close(advantage, (advantage[:, :1] * mask))
    assert torch.equal(data["raw_advantage"], data["advantage"])
    # float32 sums of four numbers of size 10
    torch.testing.assert_close(advantage[:, 0].view(2, 4).sum(1), torch.zeros(2), atol=1e-5, rtol=0)
    assert set(trainer.algorithm.networks.trained) == {"actor"} and "state_value" not in data.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_no_groups_are_refused(task, name):
    """One response to a prompt has no siblings: the remedy is said before any work."""
    with pytest.raises(
        ValueError, match=r"several responses to one prompt.*gives each prompt 1; give --env.group-size 4"
    ):
        make_trainer(task | dict(group_size=1), learner=name)


@pytest.mark.parametrize("name", ["a2c", "reinforce"])
def test_one_pass_only(name):
    """Learners without a ratio make one pass over a rollout, and have no setting for more."""
    settings, _ = ALGORITHMS[name]
    assert settings().epochs == 1
    with pytest.raises(TypeError, match="epochs"):
        settings(epochs=2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a2c", dict(lmbda=1.5), r"lmbda must lie in \[0, 1\], got 1.5"),
        ("a2c", dict(entropy_coef=-1.0), "entropy_coef must be 0 or more"),
        ("reinforce", dict(gamma=-0.1), r"gamma must lie in \[0, 1\]"),
        ("rloo", dict(epochs=0), "epochs must be at least 1"),
        ("rloo", dict(clip=0.0), r"clip must lie in \(0, 1\), got 0.0"),
        ("grpo", dict(aggregation="mean"), "aggregation must be one of sequence, token, got 'mean'"),
        ("grpo", dict(kl_loss="k1"), "kl_loss must be one of none, k2, k3, got 'k1'"),
        ("ppo", dict(kl_loss="k1"), "kl_loss must be one of none, k2, k3, got 'k1'"),
    ],
)
def test_bad_settings(name, settings, message):
    """Bad settings are refused before any work, with the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        ALGORITHMS[name][0](**settings)
