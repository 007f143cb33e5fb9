"""Score normalization: formulas, environment outputs, checkpoints and evaluation."""

from __future__ import annotations

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.text.evaluation import evaluate
from tests.support import tiny
from tests.support.faces import STOPS
from tests.support.learning import make_rollout, make_trainer, same, weights
from textenv import TextGenConfig, build_task
from textenv.conformance import check_faces
from textenv.generation import score_responses
from textenv.rewards.base import Scores
from textenv.rewards.normalization import FixedStatistics, Normalizer, RunningStatistics
from textenv.state import start
from textenv.torchrl_env import TextGenTorchEnv

pytestmark = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
RUNNING = dict(score_normalization="running")


@pytest.fixture(autouse=True)
def kind_of_models(kind):
    """One architecture is enough here."""


def characters(prompts, responses):
    """Characters of the response."""
    return [len(response) for response in responses]


def scored(*numbers):
    """Final scores of one reward named "r"."""
    return Scores(torch.tensor(numbers), {"r": torch.tensor(numbers)})


# ---- formulas


def test_running_statistics_are_those_of_all_scores():
    """After each batch they equal the mean and standard deviation of all scores so far, even far from zero."""
    generator = np.random.default_rng(0)
    for offset in (0.0, 1e6):
        statistics, seen = RunningStatistics(), np.zeros(0)
        for size in (1, 5, 0, 2, 100):
            batch = offset + generator.normal(size=size) * 3
            statistics.update(torch.tensor(batch))
            seen = np.concatenate([seen, batch])
            assert statistics.count == len(seen) and statistics.mean == pytest.approx(seen.mean(), rel=1e-12)
            if len(seen) > 1:
                assert statistics.std == pytest.approx(seen.std(), rel=1e-6)


def test_equal_scores():
    """One score, or several equal scores, normalize to 0, not to NaN or noise."""
    for size in (1, 3):
        normalizer = Normalizer(RunningStatistics())
        for _ in range(3):
            assert normalizer(scored(*[0.1] * size)).final.tolist() == pytest.approx([0.0] * size, abs=1e-6)


def test_hand_computed():
    """(score - mean) / std, then the clip; the parts keep the unnormalized scores."""
    paid = Normalizer(FixedStatistics(1.0, 2.0), clip=1.5)(scored(-9.0, 1.0, 3.0, 9.0))
    assert paid.final.tolist() == [-1.5, 0.0, 1.0, 1.5] == paid.total.tolist()
    assert paid.parts["r"].tolist() == paid.parts["raw"].tolist() == [-9.0, 1.0, 3.0, 9.0]
    normalizer = Normalizer(RunningStatistics())
    assert normalizer(scored(1.0, 3.0)).final.tolist() == [-1.0, 1.0]  # mean 2, deviation 1
    assert normalizer(scored(8.0)).final.tolist() == pytest.approx([4 / math.sqrt(26 / 3)])  # 1, 3, 8: 4 and 26/3


def test_per_token_rewards_are_not_normalized():
    """Only the final score is normalized; "raw" is the score of the whole response."""
    tokens = torch.tensor([[1.0, 2.0]])
    scores = Scores(torch.tensor([5.0]), {"r": torch.tensor([8.0])}, tokens)
    paid = Normalizer(FixedStatistics(1.0, 2.0))(scores)
    assert torch.equal(paid.tokens, tokens) and paid.final.tolist() == [2.0] and paid.total.tolist() == [5.0]
    assert paid.parts["raw"].tolist() == [8.0]


def test_state_through_json():
    """Statistics continue from a state saved as JSON, equal to the bit."""
    first, second = RunningStatistics(), RunningStatistics()
    for batch in torch.randn(5, 7, generator=torch.Generator().manual_seed(0)):
        first.update(batch)
        second.load_state_dict(json.loads(json.dumps(second.state_dict())))
        second.update(batch)
    assert first.state_dict() == second.state_dict() and first.count == 35


# ---- the environment


def play(settings, text):
    """The reward and info of the last step of an episode."""
    env = gym.make("TextGen-v0", **{**settings, "reward": characters, "kl_coef": 0})
    env.reset(seed=0)
    for token in tiny.tokenizer()(text).input_ids:
        env.step(token)
    _, reward, *_, info = env.step(tiny.END)
    return reward, info


def test_the_score_in_info_is_the_paid_score(settings):
    """`score` is normalized and clipped; `score_parts` holds the raw sum and each reward's own score."""
    fixed = dict(score_normalization="fixed", score_mean=1.0, score_std=4.0)
    for more, wanted in [
        (fixed, 0.5),
        (fixed | dict(score_clip=0.25), 0.25),
        (dict(score_clip=2.0), 2.0),
        (RUNNING, 0.0),
    ]:
        reward, info = play(settings | more, "abc")
        assert reward == info["score"] == wanted
        assert info["score_parts"] == {"characters": 3.0, "raw": 3.0}
    assert play(settings, "abc")[1]["score_parts"] == {"characters": 3.0}


def test_faces_agree_under_fixed_normalization(settings):
    """Normalized and clipped scores are the same in every face."""
    more = dict(score_normalization="fixed", score_mean=0.5, score_std=0.7, score_clip=1.0, stop_token_ids=STOPS)
    task = build_task(TextGenConfig(**{**settings, **more}))
    check_faces(task, rows=2, torchrl_env=TextGenTorchEnv(task, 2))


def test_conformance_refuses_running_statistics(settings):
    """Under running statistics a score depends on earlier scores; the check says so instead of failing a face."""
    with pytest.raises(ValueError, match=r"running normalization .* score_normalization='none'"):
        check_faces(build_task(TextGenConfig(**settings | RUNNING)))


def test_tokens_per_pass_do_not_matter(settings):
    """Running statistics are updated once by all responses scored together, whatever `tokens_per_pass` is."""
    scored_by_pass = []
    for tokens_per_pass in (1, 4096):
        task = build_task(TextGenConfig(**{**settings, **RUNNING, "reward": characters, "kl_coef": 0}))
        prompts = task.prompts
        state = start(prompts.input_ids, prompts.attention_mask, 12, 0)
        for tokens in ([65, 66, 67, tiny.END], [tiny.END, 66, 67, 0], [0, tiny.END, 67, 0], [0, 0, tiny.END, 0]):
            state = state.append(torch.tensor(tokens), torch.tensor(tokens) > 0)
        scored_by_pass.append(score_responses(task, state, prompts.texts, tokens_per_pass))
        assert task.normalizer.statistics.count == 4
    single, together = scored_by_pass
    assert torch.equal(single.score, together.score) and single.score.std() > 0.5
    assert torch.equal(single.reward, together.reward)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(score_normalization="mean"), "score_normalization must be 'none', 'fixed' or 'running', got 'mean'"),
        (dict(score_normalization=None), "score_normalization must be .*, got None"),
        (dict(score_normalization="fixed", score_std=0), "score_std must be above 0, got 0"),
        (dict(score_normalization="fixed", score_std=-1.0), "score_std must be above 0"),
        (dict(score_normalization="fixed", score_mean=math.nan), "score_mean must be a finite number, got nan"),
        (dict(score_normalization="fixed", score_mean="1"), "score_mean must be a finite number, got '1'"),
        (dict(score_normalization="fixed", score_mean=None), "score_mean must be a finite number, got None"),
        (dict(score_clip=0), "score_clip must be above 0, or None for no limit, got 0"),
        (dict(score_clip=math.inf), "score_clip must be a finite number or None, got inf"),
        (dict(score_clip=True), "score_clip must be a finite number or None, got True"),
        (dict(score_mean=1.0), "score_mean=1.0 would do nothing: .*score_normalization='fixed' alone; set it"),
        (dict(score_normalization="running", score_std=2.0), "score_std=2.0 would do nothing"),
    ],
)
def test_bad_settings(settings, changes, says):
    """Invalid settings raise an error with the remedy when the environment is made."""
    with pytest.raises(ValueError, match=says):
        gym.make("TextGen-v0", **{**settings, **changes})


def test_a_reward_named_raw(settings):
    """A reward named "raw" is allowed only without normalization, which uses that key."""

    def raw(prompts, responses):
        return [0.0] * len(responses)

    assert build_task(TextGenConfig(**{**settings, "reward": raw})).score_part_names == ("raw",)
    with pytest.raises(ValueError, match=r"a reward is named 'raw'.*another name"):
        build_task(TextGenConfig(**{**settings, "reward": raw, **RUNNING}))


# ---- learners


def test_resumed_equals_uninterrupted(settings, tmp_path):
    """With running normalization, a resumed run equals an uninterrupted run to the bit."""
    settings = settings | RUNNING | dict(reward={"tests.textenv.rewards.test_normalization:characters": 1.0})
    whole = make_trainer(settings)
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    stopped = make_trainer(settings)
    first = next(stopped.iterate())
    save_checkpoint(tmp_path, stopped)
    resumed = make_trainer(settings)
    load_checkpoint(tmp_path, resumed)
    assert resumed.collector.task.normalizer.statistics.count == 8
    scores = [first.metrics["score"]] + [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    assert same(weights(whole.algorithm.networks.actor), weights(resumed.algorithm.networks.actor))
    statistics = whole.collector.task.normalizer.statistics.state_dict()
    assert statistics == resumed.collector.task.normalizer.statistics.state_dict() and statistics["count"] == 24


def test_evaluation_is_not_normalized(settings):
    """Evaluation reports unnormalized scores, before and after the statistics change, and does not update them."""
    trainer = make_trainer(settings | RUNNING | dict(reward=characters, kl_coef=0))
    model = trainer.algorithm.networks.policy.model

    def measure():
        return evaluate(trainer.collector.task, model, trainer.collector.prompts, None, seed=0)

    before = measure()
    assert before.score == [float(len(response)) for response in before.responses]
    assert trainer.collector.task.normalizer.statistics.count == 0
    make_rollout(trainer)
    assert trainer.collector.task.normalizer.statistics.count == 8
    assert measure() == before
    assert trainer.collector.task.normalizer.statistics.count == 8


def test_frozen_statistics(settings):
    """`with_frozen_statistics` normalizes by the current statistics and does not update them."""
    trainer = make_trainer(settings | RUNNING)
    make_rollout(trainer)
    statistics = trainer.collector.task.normalizer.statistics.state_dict()
    frozen = trainer.collector.task.with_frozen_statistics().normalizer
    mean, std = trainer.collector.task.normalizer.statistics.mean, trainer.collector.task.normalizer.statistics.std
    for _ in range(2):
        assert frozen(scored(7.0)).final.tolist() == pytest.approx([(7 - mean) / std])
    assert trainer.collector.task.normalizer.statistics.state_dict() == statistics


def test_metrics_show_the_parts(settings):
    """With several rewards, or normalization, every iteration's metrics hold the mean of each part."""
    name = "tests.textenv.rewards.test_normalization:characters"
    single = next(make_trainer(settings | dict(reward=name), iterations=1).iterate())
    assert not any(metric.startswith("score/") for metric in single.metrics)
    both = {name: 2.0, "textenv.rewards.library:length": -1.0}
    iteration = next(make_trainer(settings | dict(reward=both), iterations=1).iterate())
    parts, data = iteration.metrics, iteration.rollout.data
    assert parts["score/textenv.rewards.library:length"] == pytest.approx(float(data["mask"].sum(1).float().mean()))
    assert parts["score"] == pytest.approx(
        2 * parts[f"score/{name}"] - parts["score/textenv.rewards.library:length"], abs=1e-5
    )
    raw = next(make_trainer(settings | dict(reward=both) | RUNNING, iterations=1).iterate()).metrics
    assert raw["score/raw"] == pytest.approx(parts["score"], abs=1e-5) and abs(raw["score"]) < 1e-5


def test_the_critic_head_starts_at_zero(settings):
    """With normalized scores the reward model's head has a different scale, so the critic's head starts at zero."""
    trainer = make_trainer(settings | dict(score_normalization="fixed", score_mean=3.0))
    critic = trainer.algorithm.networks.critic
    assert not critic.head.weight.any() and not critic.head.bias.any()
    assert same(weights(critic.backbone), weights(trainer.collector.task.reward.model.base_model))
