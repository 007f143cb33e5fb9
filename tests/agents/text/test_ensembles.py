"""Learners whose reward is an ensemble: where the critic starts, what is logged, stored and sharded."""

from __future__ import annotations

import pytest
import torch

from agents.ranks import connected
from agents.text.fingerprints import fingerprints
from agents.text.rollout import readers
from agents.text.sharding import frozen_models
from tests.support import tiny
from tests.support.learning import make_rollout, make_trainer, same, weights
from tests.support.rank import environment, free_port
from textenv.rewards.reward_model import RewardEnsemble, RewardModel, linear_head, member_name, reward_models


@pytest.fixture
def kind() -> str:
    """One architecture is enough here."""
    return "gpt2"


@pytest.fixture(scope="module")
def ensembles(tmp_path_factory) -> dict[str, str]:
    """Folders of an ensemble of two models, and of one of two heads."""
    root = tmp_path_factory.mktemp("ensembles")
    for index in range(2):
        tiny.save(tiny.reward_model("gpt2", seed=index + 1), root / "models" / member_name(index))
    heads = tiny.reward_model("gpt2", labels=2)
    heads.config.id2label = {index: member_name(index) for index in range(2)}
    heads.config.problem_type = "regression"
    tiny.save(heads, root / "heads")
    return {name: str(root / name) for name in ("models", "heads")}


def test_the_critic_starts_from_the_first_model(settings, ensembles):
    """Of K models the critic takes the first, backbone and head: its last value is that member's score."""
    trainer = make_trainer(settings | dict(reward=ensembles["models"]))
    reward, critic = trainer.collector.task.reward, trainer.algorithm.networks.critic
    assert same(weights(critic.backbone), weights(reward.models[0].model.base_model))
    rollout = make_rollout(trainer)
    last = rollout.data["mask"].sum(1, keepdim=True)
    wanted = reward.member_scores(rollout.scored.batch)[:, 0]
    torch.testing.assert_close(critic.all_states(rollout.data).gather(1, last)[:, 0], wanted, atol=1e-4, rtol=1e-4)


def test_the_critic_of_heads_starts_from_their_mean(settings, ensembles):
    """Of K heads the critic takes their mean, which is the score itself where they are combined by it."""
    trainer = make_trainer(settings | dict(reward=ensembles["heads"]))
    data, critic = make_rollout(trainer).data, trainer.algorithm.networks.critic
    last = data["mask"].sum(1, keepdim=True)
    torch.testing.assert_close(critic.all_states(data).gather(1, last)[:, 0], data["score"], atol=1e-4, rtol=1e-4)


def test_the_mean_head_by_hand():
    """Heads of weights w and v make the head (w + v) / 2, with a zero bias."""
    model = tiny.reward_model("gpt2", labels=2)
    model.config.id2label = {0: "member-0", 1: "member-1"}
    head = linear_head(RewardEnsemble([RewardModel(model, label="member-0")]))
    torch.testing.assert_close(head.weight[0], (model.score.weight[0] + model.score.weight[1]) / 2)
    assert not head.bias.any()


def test_the_disagreement_is_logged(settings, ensembles):
    """Every iteration's metrics hold the mean std over members, and with κ the score is the mean less κ times it."""
    metrics = {}
    for combine in ("mean", 2.0):
        given = settings | dict(reward=ensembles["models"], reward_ensemble=combine)
        iteration = next(make_trainer(given, iterations=1).iterate())
        metrics[combine] = iteration.metrics
        members = iteration.rollout.scored.batch
        stds = make_trainer(given).collector.task.reward.member_scores(members).std(1, correction=0)
        assert iteration.metrics["score/disagreement"] == pytest.approx(float(stds.mean()), abs=1e-4) != 0
    mean, cautious = metrics["mean"], metrics[2.0]  # of the same responses, since no step was taken before
    assert cautious["score"] == pytest.approx(mean["score"] - 2 * mean["score/disagreement"], abs=1e-4)


def test_all_members_are_known(settings, ensembles):
    """Fingerprints name every model of an ensemble, and rollouts and shards read every one."""
    task = make_trainer(settings | dict(reward=ensembles["models"])).collector.task
    hashes = fingerprints(task, task.prompts, task.prompts)
    assert hashes["reward model 1"] != hashes["reward model 2"] and "reward model 3" not in hashes
    models = [reward.model for reward in reward_models(task.reward)]
    assert len(models) == 2 and all(model in readers(task) and model in frozen_models(task) for model in models)


def test_sharded_members(settings, ensembles, monkeypatch):
    """Under --shard full each member keeps a part of its weights, and a rollout's scores are those of whole ones."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    given = settings | dict(reward=ensembles["models"], reward_ensemble="min")
    with connected(60) as ranks:
        plain, sharded = (make_trainer(given, iterations=1, ranks=ranks, shard=shard) for shard in ("none", "full"))
        task = sharded.collector.task
        for reward in reward_models(task.reward):
            assert {weight.numel() for weight in reward.model.parameters()} == {0}
        assert all(weight.numel() for model in readers(plain.collector.task) for weight in model.parameters())
        one, other = (next(trainer.iterate()).metrics for trainer in (plain, sharded))
    for name in ("score", "score/disagreement"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
