"""What replay holds stays in units that hold: raw observations, rewards and scores, normalized when they are sampled."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from agents.algorithms.registry import find_algorithm
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.trainer import Trainer
from tests.support.learning import make_trainer, same, weights

SMALL = dict(buffer_size=200, learning_starts=8, gradient_steps=3)


def watch(trainer) -> list:
    """The minibatches of every update from now on, as the losses see them."""
    batches, loss = [], trainer.algorithm.loss
    trainer.algorithm.loss = lambda batch: (batches.append(batch.clone()), loss(batch))[1]
    return batches


def normalized_run(name) -> tuple[ControlExperiment, Trainer]:
    """A run whose frames and rewards are normalized."""
    limit = ("max_episode_steps=20",)  # episodes fit between checkpoints
    sizes = dict(iterations=4, minibatch_size=64, checkpoint_every=2)
    config = TrainConfig(env="CartPole-v1", env_arg=limit, algorithm=name, **sizes)
    settings = ControlConfig(num_envs=4, steps=16, normalize_observation=True, normalize_reward=True)
    experiment = ControlExperiment(config, settings)
    settings_class, algorithm = find_algorithm(name)
    learner = algorithm(settings_class(**SMALL), experiment.network_factory)
    return experiment, Trainer(config, learner, experiment.collector)


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_resumed_equals_uninterrupted(name, tmp_path):
    """With normalization too: raw rows and statistics are in the checkpoint, and the weights equal to the bit."""
    (_, whole), (_, stopped), (_, resumed) = (normalized_run(name) for _ in range(3))
    list(whole.iterate())
    iterations = stopped.iterate()
    next(iterations), next(iterations)
    save_checkpoint(tmp_path, stopped)
    load_checkpoint(tmp_path, resumed)
    list(resumed.iterate())
    for network, other in zip(*(run.algorithm.networks.trained.values() for run in (whole, resumed)), strict=True):
        assert same(weights(network), weights(other))


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_control(name):
    """Frames of all iterations are in today's units: (x − mean) / deviation by the statistics of all frames so far."""
    experiment, trainer = normalized_run(name)
    batches, frames = watch(trainer), []
    for iteration in trainer.iterate():
        data = iteration.rollout.data
        frames.append(data["raw_observation"][data["mask"]].numpy())
        observed, returned = experiment.environments.observations.obs_rms, experiment.environments.rewards.return_rms
        known = np.concatenate(frames)
        expected = np.clip((known - observed.mean) / np.sqrt(observed.var + 1e-8), -10, 10)
        seen = set()
        for batch in batches:
            for row in batch["observation"][:, 0].numpy():
                gap = np.abs(expected - row).max(1)
                assert gap.min() < 1e-5
                seen.add(int(gap.argmin()))
            # CartPole pays 1 a step; rewards of all times are in today's units.
            np.testing.assert_allclose(batch["reward"], min(1 / np.sqrt(returned.var + 1e-8), 10), rtol=1e-5)
        batches.clear()
    assert min(seen) < len(frames[0]) and max(seen) >= len(known) - len(frames[-1])  # of the first and last iteration


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_text(settings, name):
    """Responses of all iterations have their raw scores in the units of all scores so far."""

    def shouts(prompts, responses):
        return [float(10 ** (len(response) % 3)) for response in responses]

    trainer = make_trainer(settings | dict(reward=shouts, score_normalization="running"), SMALL, name, iterations=3)
    batches, scores = watch(trainer), []
    for iteration in trainer.iterate():
        scores += iteration.rollout.scored.score_parts["raw"].tolist()
        mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
        for batch in batches:
            paid = batch["reward"] - batch["kl_coef"][:, None] * batch["reference_log_prob"]
            final = paid.where(batch["done"], 0.0).sum(1)
            assert not paid.where(batch["mask"] & ~batch["done"], 0.0).abs().max() > 1e-5
            raw = final * deviation + mean
            known = torch.tensor([1.0, 10.0, 100.0])
            torch.testing.assert_close((raw[:, None] - known).abs().amin(1), torch.zeros(len(raw)), atol=1e-3, rtol=0)
        batches.clear()
    assert len(set(scores)) > 1
