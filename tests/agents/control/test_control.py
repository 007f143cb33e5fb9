"""Learning on environments other than text: what is recorded, what is bootstrapped, and that it learns."""

from __future__ import annotations

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from agents import run
from agents.algorithms.registry import ALGORITHMS, find_algorithm
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.config import TrainConfig
from agents.control.collector import playable
from agents.control.config import ControlConfig
from agents.control.environments import Returns
from agents.control.experiment import PANELS, ControlExperiment, play
from agents.objectives.advantages import Ends, estimate_advantages
from agents.presets import PRESETS, defaults
from agents.reporting import plots
from agents.text.config import TextConfig
from agents.trainer import Trainer
from tests.support.learning import same, weights

SHRUNK = dict(iterations=3, minibatch_size=32, learning_rate=1e-3, critic_learning_rate=1e-3)


def build(env: str, settings: dict | None = None, **changes) -> tuple[ControlExperiment, Trainer]:
    """A small run with the default algorithm's own settings."""
    config = TrainConfig(env=env, **(SHRUNK | changes))
    given = ControlConfig(**(dict(num_envs=3, steps=16, evaluation_episodes=4) | (settings or {})))
    algorithm = defaults(env, config.algorithm)[2]
    experiment, trainer = run.build(config, given, algorithm)
    assert isinstance(experiment, ControlExperiment)
    return experiment, trainer


class Steps(gym.Env):
    """An episode of three steps that ends by itself (`limit=False`), or is cut off; the observation is the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, limit: bool = False) -> None:
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.step_number += 1
        end = self.step_number == 3
        observation = np.array([self.step_number], np.float32)
        return observation, 10.0 + self.step_number, end and not self.limit, end and self.limit, {}


gym.register("Steps-v0", Steps)


@pytest.mark.parametrize("limit", [False, True])
def test_what_a_rollout_holds(limit):
    """Observations, true successors, rewards, ends and the mask are those of the episodes, in two rollouts on end."""
    _, trainer = build("Steps-v0", dict(steps=6, num_envs=2), env_arg=(f"limit={json.dumps(limit)}",))
    first = trainer.collector.collect(trainer.algorithm.policy)
    second = trainer.collector.collect(trainer.algorithm.policy)
    columns = {key: torch.cat([value, second.data[key]], 1) for key, value in first.data.items()}
    # three steps, then one that only begins anew, over and over
    assert columns["mask"][0].tolist() == [True, True, True, False] * 3
    assert columns["observation"][0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0] * 3
    assert columns["next_observation"][0, :, 0].tolist() == [1.0, 2.0, 3.0, 0.0] * 3
    assert columns["done"][0].tolist() == [False, False, True, False] * 3
    assert columns["terminated"][0].tolist() == [False, False, not limit, False] * 3
    assert columns["reward"][0][columns["mask"][0]].tolist() == [11.0, 12.0, 13.0] * 3
    assert first.metrics["return"] == second.metrics["return"] == 36.0 and first.metrics["length"] == 3.0
    rows = trainer.collector.rows(first.data)
    assert len(rows) == 2 * 5 and rows["observation"].shape == (10, 1, 1) and rows["mask"].all()


def test_time_limits_are_bootstrapped():
    """A cut episode's last step is worth its reward and the value of where it was cut; one that ended, its reward."""
    gamma, lmbda, value = 0.9, 0.8, torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    reward, mask = torch.tensor([[11.0, 12.0, 13.0, 99.0]]), torch.tensor([[True, True, True, False]])
    done = torch.tensor([[False, False, True, False]])
    for terminated, beyond in ((done, 0.0), (torch.zeros_like(done), 5.0)):
        advantage, target = estimate_advantages(reward, value, Ends(mask, done, terminated), gamma, lmbda)
        third = 13 + gamma * beyond - 3
        second = 12 + gamma * 3 - 2 + gamma * lmbda * third
        first = 11 + gamma * 2 - 1 + gamma * lmbda * second
        assert advantage[0].tolist() == pytest.approx([first, second, third, 0.0], rel=1e-6)
        assert target[0].tolist() == pytest.approx([first + 1, second + 2, third + 3, 0.0], rel=1e-6)


def test_a_rollouts_end_is_bootstrapped():
    """Where a rollout stops in the middle of an episode, the value of the next state stands for the rest."""
    advantage, _ = estimate_advantages(
        torch.tensor([[1.0]]),
        torch.tensor([[2.0, 4.0]]),
        Ends(torch.tensor([[True]]), torch.tensor([[False]]), torch.tensor([[False]])),
        0.5,
        0.9,
    )
    assert advantage.item() == pytest.approx(1 + 0.5 * 4 - 2)


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {}),
        ("Pendulum-v1", dict(distribution="tanh")),
        ("Pendulum-v1", dict(normalize_observation=True, normalize_reward=True)),
    ],
    ids=["discrete", "gaussian", "tanh", "normalized"],
)
def test_first_ratios_are_one(env, settings):
    """Recorded log-probabilities are those of the actor before its first update, and entropy is their mean."""
    _, trainer = build(env, settings)
    rollout = trainer.collector.collect(trainer.algorithm.policy)
    data = rollout.data
    fresh = trainer.algorithm.actor.get_dist(data).log_prob(data["action"])
    # tanh's inverse in float32 loses digits near the bounds
    torch.testing.assert_close(
        fresh, data["action_log_prob"], atol=1e-3 if settings.get("distribution") else 1e-5, rtol=0
    )
    assert rollout.metrics["entropy"] == pytest.approx(float(-fresh[data["mask"]].mean().detach()), abs=1e-3)


def test_tanh_actions_stay_inside():
    """A squashed Gaussian never leaves the bounds, however wide it is; a plain one does and is clipped when played."""
    space = gym.spaces.Box(np.array([-2.0], np.float32), np.array([2.0], np.float32))
    for kind, inside in (("tanh", True), ("gaussian", False)):
        _, trainer = build("Pendulum-v1", dict(distribution=kind, initial_log_std=2.0))
        data = trainer.collector.collect(trainer.algorithm.policy).data
        assert bool((data["action"].abs() <= 2).all()) is inside
        assert np.abs(playable(data["action"][:, 0].numpy(), space)).max() <= 2
        assert data["action_log_prob"].isfinite().all()


def test_a_squashed_gaussian_has_no_entropy_bonus():
    """TorchRL would estimate it from global random numbers; refused with the remedy."""
    config, settings = TrainConfig(env="Pendulum-v1", **SHRUNK), ControlConfig(num_envs=2, steps=8, distribution="tanh")
    algorithm = type(defaults("Pendulum-v1", config.algorithm)[2])(entropy_coef=0.1)
    _, trainer = run.build(config, settings, algorithm)
    with pytest.raises(ValueError, match="no entropy in closed form; set entropy_coef to 0, or distribution"):
        next(trainer.iterate())


def test_native_is_sync():
    """CartPole's own vector environment and Gymnasium's synchronous one give the same kind of experience."""
    for mode in ("auto", "sync"):
        experiment, trainer = build("CartPole-v1", dict(vectorization=mode, num_envs=4, steps=64))
        assert isinstance(experiment.environments.env.unwrapped, SyncVectorEnv) is (mode == "sync")
        rollout = trainer.collector.collect(trainer.algorithm.policy)
        mask, done = rollout.data["mask"], rollout.data["done"]
        # each end but one in the last column is followed by one step that is none
        assert torch.equal(~mask[:, 1:], done[:, :-1]) and mask[:, 0].all()
        assert rollout.data["reward"][mask].eq(1).all()
        assert rollout.metrics["length"] == rollout.metrics["return"]


@pytest.mark.parametrize(
    ("env", "settings"),
    [("CartPole-v1", {}), ("Pendulum-v1", dict(normalize_observation=True, normalize_reward=True))],
    ids=["discrete", "normalized"],
)
def test_resumed_equals_uninterrupted(env, settings, tmp_path):
    """A run stopped at a checkpoint and resumed gives the same weights, statistics and returns, to the bit."""
    changes = dict(iterations=4, checkpoint_every=2, env_arg=("max_episode_steps=30",))
    whole, stopped, resumed = (build(env, settings, **changes) for _ in range(3))
    rewards = [iteration.rollout.data["reward"] for iteration in whole[1].iterate()]
    steps = stopped[1].iterate()
    for _ in range(2):
        next(steps)
    save_checkpoint(tmp_path, stopped[1])
    load_checkpoint(tmp_path, resumed[1])
    again = [iteration.rollout.data["reward"] for iteration in resumed[1].iterate()]
    assert same(rewards[2:], again)
    for name in ("actor", "critic"):
        assert same(weights(whole[1].algorithm.trained[name]), weights(resumed[1].algorithm.trained[name]))
    assert whole[0].environments.state_dict() == resumed[0].environments.state_dict()
    assert whole[0].evaluate(whole[1].algorithm.policy) == resumed[0].evaluate(resumed[1].algorithm.policy)


def test_same_seed_same_run_other_seed_another():
    """The seed decides weights, episodes and actions, and nothing else does."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # global randomness must not matter
        _, trainer = build("CartPole-v1", seed=seed, iterations=1)
        list(trainer.iterate())
        found.append(weights(trainer.algorithm.actor))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_measuring_leaves_the_run_alone():
    """Evaluation normalizes by the run's statistics, moves none of them, and always plays the same episodes."""
    experiment, trainer = build("Pendulum-v1", dict(normalize_observation=True, normalize_reward=True))
    next(trainer.iterate())
    before = experiment.environments.state_dict()
    first, second = (experiment.evaluate(trainer.algorithm.policy) for _ in range(2))
    assert first == second and len(first.returns) == 4 and set(first.lengths) == {200}
    assert experiment.environments.state_dict() == before and before["observation"]["count"] > 10
    # a cut-off pendulum pays at least −17 a step; normalized rewards would be far smaller
    assert np.mean(first.returns) < -200


def test_measuring_plays_the_best_action():
    """Each episode's return is that of the policy without chance, by stepping a single environment."""
    experiment, trainer = build("CartPole-v1")
    found, env = play(experiment.environments, trainer.algorithm.policy), gym.make("CartPole-v1")
    observation, _ = env.reset(seed=1_000_000)
    total, ended = 0.0, False
    while not ended:
        action = int(trainer.algorithm.policy.greedy(torch.as_tensor(observation)[None])[0])
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    # the native vector environment draws its starts otherwise, so only a sync one can be compared
    sync, _ = build("CartPole-v1", dict(vectorization="sync"))
    assert sync.evaluate(trainer.algorithm.policy).returns[0] == total
    assert len(found.returns) == 3


class Endless(Steps):
    """Nothing that is done here ends it."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, False, False, {}


gym.register("Endless-v0", Endless)


def test_measuring_gives_up(monkeypatch):
    """An episode that no policy and no time limit ends gets a sentence, not a wait without end."""
    monkeypatch.setattr("agents.control.experiment.LONGEST", 20)
    experiment, trainer = build("Endless-v0")
    with pytest.raises(ValueError, match=r"4 of 4 episodes had not ended after 20 steps.*max_episode_steps=1000"):
        experiment.evaluate(trainer.algorithm.policy)
    for unlimited in ("-1", "null"):
        experiment, trainer = build("Endless-v0", env_arg=(f"max_episode_steps={unlimited}",))
        assert experiment.environments.limit is None
    experiment, trainer = build("Endless-v0", env_arg=("max_episode_steps=7",))
    assert experiment.evaluate(trainer.algorithm.policy).lengths == [7] * 4


@pytest.mark.parametrize("limit", [True, False], ids=["cut-off", "terminated"])
def test_normalized_returns_end_with_their_episodes(limit):
    """Rewards are divided by the deviation of discounted returns, none of which runs on into the next episode."""
    experiment, _ = build("Steps-v0", dict(normalize_reward=True, num_envs=1), env_arg=(f"limit={str(limit).lower()}",))
    environments, returns, total = experiment.environments, [], 0.0
    environments.reset(0)
    for step in range(40):
        environments.env.step(np.zeros(1, np.int64))
        reward = [11.0, 12.0, 13.0, 0.0][step % 4]
        if step % 4 == 3:
            continue  # that only began anew
        total = 0.99 * total + reward
        returns.append(total)
        total = 0.0 if step % 4 == 2 else total
    assert environments.rewards is not None
    assert float(environments.rewards.return_rms.var) == pytest.approx(np.var(returns), rel=1e-2)


def test_what_is_normalized_is_cut_off():
    """Early statistics make no giants: normalized observations and rewards stay within 10."""
    _, trainer = build("MountainCar-v0", dict(normalize_observation=True, normalize_reward=True))
    data = trainer.collector.collect(trainer.algorithm.policy).data
    assert data["observation"].abs().max() <= 10
    assert data["reward"].min() == -10  # the first rewards are all alike, and their deviation next to nothing


def test_episodes_fit_between_checkpoints():
    """Checkpoints at which the longest episodes would never end are refused, with the number that suits."""
    with pytest.raises(ValueError, match=r"last up to 500 steps.*32 steps apart; set checkpoint_every to at least 32"):
        build("CartPole-v1", iterations=9, checkpoint_every=2)


def test_returns_are_summed_exactly():
    """Float32 rewards are summed in float64, over rollouts too."""
    env = Returns(SyncVectorEnv([Tenths]))
    env.reset(seed=0)
    for _ in range(3):
        for _ in range(1000):
            env.step(np.zeros(1, np.int64))
        found = env.take()
    assert [episode.length for episode in found] == [2500]
    assert found[0].total == pytest.approx(2500 * float(np.float32(0.1)), rel=1e-12)


class Tenths(gym.Env):
    """2,500 steps of a tenth each, paid in float32."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 2500
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), np.float32(0.1), self.left == 0, False, {}


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 5, 4)])
def test_networks_read_any_shape(shape):
    """One state, none, a row of them or rows of rows."""
    _, trainer = build("CartPole-v1")
    assert trainer.algorithm.policy(torch.zeros(shape)).shape == (*shape[:-1], 2)


def test_environments_of_a_module(tmp_path, monkeypatch):
    """`module:id` imports the module that registers the environment, as gym.make does, and finds its presets."""
    (tmp_path / "toy_module.py").write_text(
        "import gymnasium\ngymnasium.register('Toy-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, trainer = build("toy_module:Toy-v0", iterations=1)
    assert next(trainer.iterate()).metrics["frames"] > 0
    for algorithm in ("rloo", "ppo"):
        config, settings, _ = defaults("textenv:TextGen-v0", algorithm)
        assert dataclasses.replace(config, env="TextGen-v0") == defaults("TextGen-v0", algorithm)[0]
        assert isinstance(settings, TextConfig)


def test_curves_join_what_was_measured(tmp_path, monkeypatch):
    """Iterations in which no episode ended leave no holes: points are joined over them."""
    kept = []
    monkeypatch.setattr(plots.pyplot, "close", kept.append)
    measured = {1: 5.0, 3: 7.0, 6: 6.0}
    rows = [{"iteration": one} | ({"return": measured[one]} if one in measured else {}) for one in range(1, 7)]
    plots.draw_curves(tmp_path / "curves.png", rows, "title", PANELS)
    line = kept[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 3, 6] and list(line.get_ydata()) == [5.0, 7.0, 6.0]


def test_cartpole_shrunk_learns(tmp_path):
    """With its preset and a tenth of the frames the return of CartPole-v1 rises to many times a random policy's."""
    config, settings, algorithm = defaults("CartPole-v1", "ppo")
    changed = dict(vars(config), run=str(tmp_path / "run"), iterations=60)
    summary = run.train(TrainConfig(**changed), settings, algorithm)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    returns = [row["return"] for row in rows if "return" in row]
    assert np.mean(returns[:3]) < 40 and np.mean(returns[-5:]) > 100
    assert summary["return_after"] > 150
    assert {"return_before", "return_std_after", "frames", "frames_per_second", "seconds"} <= set(summary)
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", [name for name in sorted(ALGORITHMS) if name not in ("rloo", "grpo")])
def test_every_algorithm_learns_cartpole_by_name(name):
    """Each learner that needs no groups trains on CartPole-v1 by its name alone, and its return rises."""
    config, settings, algorithm = defaults("CartPole-v1", name)
    few = {"ppo": 30, "dqn": 70, "sac": 70, "a2c": 600}.get(name, 40)
    if not find_algorithm(name)[1].on_policy:  # the preset's 128 updates take half a minute
        settings = dataclasses.replace(settings, hidden=(64, 64))
        quick = {"epsilon_updates": 500, "target_update_interval": 64} if name == "dqn" else {"tau": 0.02}
        algorithm = dataclasses.replace(algorithm, gradient_steps=32, learning_starts=256, **quick)
    _, trainer = run.build(dataclasses.replace(config, iterations=few), settings, algorithm)
    returns = [iteration.metrics["return"] for iteration in trainer.iterate() if "return" in iteration.metrics]
    assert np.mean(returns[:2]) < 40 and np.mean(returns[-5:]) > 60


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_groups_are_of_text(name):
    """Learners that compare responses to one prompt say so where there is none."""
    with pytest.raises(
        ValueError, match=r"compares several responses to one prompt.*choose an algorithm with a critic"
    ):
        run.build(*defaults("CartPole-v1", name))


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_continuous_actions_need_a_gaussian(name):
    """Learners of a value for every action refuse actions that cannot be listed."""
    with pytest.raises(
        ValueError, match=r"value for each of a list of actions.*choose an algorithm with a Gaussian policy"
    ):
        run.build(*defaults("Pendulum-v1", name))


@pytest.mark.parametrize("env", sorted(PRESETS))
def test_presets_open(env):
    """Every preset names real settings, and its environment can be opened with it."""
    if env.startswith("LunarLander"):
        pytest.importorskip("Box2D")
    for algorithm in PRESETS[env]:
        config, settings, algorithm_config = defaults(env, algorithm)
        assert config.env == env and config.algorithm == algorithm
        if env != "TextGen-v0":
            run.build(config, settings, algorithm_config)


class Odd(gym.Env):
    """An environment whose actions nobody here can take."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, kind: str = "multi") -> None:
        unbounded = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([2, 2]) if kind == "multi" else unbounded


gym.register("Odd-v0", Odd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(env="Odd-v0"), r"take Discrete actions from 0 and flat Box actions, got MultiDiscrete.*TransformAction"),
        (
            dict(env="Odd-v0", env_arg=("kind=box",), settings=dict(distribution="tanh")),
            "tanh squashes actions into bounds.*set distribution to gaussian",
        ),
        (dict(env="CartPole-v1", env_arg=("gravity=1",)), "gym.make_vec cannot make 'CartPole-v1'.*gravity"),
        (dict(env="Nowhere-v3"), "cannot make 'Nowhere-v3'"),
    ],
)
def test_environments_that_cannot_be_learned_on(arguments, message):
    """What cannot be played is refused before any work, in a sentence."""
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_envs=0), "num_envs must be at least 1, got 0"),
        (dict(hidden=(64, 0)), r"hidden must be widths of at least 1, got \(64, 0\)"),
        (dict(activation="gelu"), "activation must be one of tanh, relu, got 'gelu'"),
        (dict(distribution="beta"), "distribution must be one of gaussian, tanh, got 'beta'"),
        (dict(vectorization="ray"), "vectorization must be one of auto, sync, async, got 'ray'"),
        (dict(initial_log_std=3.0), r"initial_log_std must lie in \[-20.0, 2.0\].*got 3.0"),
        (dict(reward_gamma=1.5), r"reward_gamma must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings(changes, message):
    """Bad settings are refused before any work, with the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        ControlConfig(**changes)
