"""Learning on environments other than text: rollouts, bootstrapping, resuming, evaluation and learning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from agents import run
from agents.algorithms.registry import ALGORITHMS, find_algorithm
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.config import TrainConfig
from agents.control.collector import clip_action
from agents.control.config import ControlConfig
from agents.control.environments import Returns
from agents.control.experiment import ControlExperiment, run_episodes
from agents.objectives.advantages import Ends, estimate_advantages
from agents.presets import PRESETS, defaults
from agents.text.config import TextConfig
from agents.trainer import Trainer
from tests.support.learning import same, weights

SHRUNK = dict(iterations=3, minibatch_size=32, learning_rate=1e-3, critic_learning_rate=1e-3)


def build(env: str, settings: dict | None = None, **changes) -> tuple[ControlExperiment, Trainer]:
    """A small run with the preset's algorithm settings."""
    config = TrainConfig(env=env, **(SHRUNK | changes))
    control = ControlConfig(**(dict(num_envs=3, steps=16, evaluation_episodes=4) | (settings or {})))
    algorithm = defaults(env, config.algorithm)[2]
    experiment, trainer = run.build(config, control, algorithm)
    assert isinstance(experiment, ControlExperiment)
    return experiment, trainer


class Steps(gym.Env):
    """Episodes of three steps that terminate (`limit=False`) or are truncated; the observation is the step number."""

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
def test_rollout_contents(limit):
    """Two consecutive rollouts hold the episodes' observations, true successors, rewards, ends and mask."""
    _, trainer = build("Steps-v0", dict(steps=6, num_envs=2), env_arg=(f"limit={json.dumps(limit)}",))
    first = trainer.collector.collect(trainer.algorithm.networks.policy)
    second = trainer.collector.collect(trainer.algorithm.networks.policy)
    data = {key: torch.cat([value, second.data[key]], 1) for key, value in first.data.items()}
    # three steps, then one that only resets
    assert data["mask"][0].tolist() == [True, True, True, False] * 3
    assert data["observation"][0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0] * 3
    assert data["next_observation"][0, :, 0].tolist() == [1.0, 2.0, 3.0, 0.0] * 3
    assert data["done"][0].tolist() == [False, False, True, False] * 3
    assert data["terminated"][0].tolist() == [False, False, not limit, False] * 3
    assert data["step_score"][0][data["mask"][0]].tolist() == [11.0, 12.0, 13.0] * 3
    assert first.metrics["return"] == second.metrics["return"] == 36.0 and first.metrics["length"] == 3.0
    rows = trainer.collector.training_rows(first.data)
    assert len(rows) == 2 * 5 and rows["observation"].shape == (10, 1, 1) and rows["mask"].all()


def test_time_limits_are_bootstrapped():
    """The last step of a truncated episode bootstraps from the next state's value; that of a terminated one does not."""
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


def test_rollout_ends_are_bootstrapped():
    """A rollout that ends inside an episode bootstraps from the value of the next state."""
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
    """Recorded log-probabilities equal the actor's before its first update; the entropy metric is their negative mean."""
    _, trainer = build(env, settings)
    rollout = trainer.collector.collect(trainer.algorithm.networks.policy)
    data = rollout.data
    fresh = trainer.algorithm.networks.actor.distribution(data).log_prob(data["action"])
    # inverting tanh in float32 loses digits near the bounds
    torch.testing.assert_close(
        fresh, data["action_log_prob"], atol=1e-3 if settings.get("distribution") else 1e-5, rtol=0
    )
    assert rollout.metrics["entropy"] == pytest.approx(float(-fresh[data["mask"]].mean().detach()), abs=1e-3)


def test_tanh_actions_stay_inside():
    """A squashed Gaussian stays within the bounds however wide it is; a plain one does not and is clipped for the environment."""
    space = gym.spaces.Box(np.array([-2.0], np.float32), np.array([2.0], np.float32))
    for kind, inside in (("tanh", True), ("gaussian", False)):
        _, trainer = build("Pendulum-v1", dict(distribution=kind, initial_log_std=2.0))
        data = trainer.collector.collect(trainer.algorithm.networks.policy).data
        assert bool((data["action"].abs() <= 2).all()) is inside
        assert np.abs(clip_action(data["action"][:, 0].numpy(), space)).max() <= 2
        assert data["action_log_prob"].isfinite().all()


def test_a_squashed_gaussian_has_no_entropy_bonus():
    """An entropy bonus is refused, with the remedy: TorchRL would estimate it with the global random generator."""
    config, settings = TrainConfig(env="Pendulum-v1", **SHRUNK), ControlConfig(num_envs=2, steps=8, distribution="tanh")
    algorithm = type(defaults("Pendulum-v1", config.algorithm)[2])(entropy_coef=0.1)
    _, trainer = run.build(config, settings, algorithm)
    with pytest.raises(ValueError, match="no entropy in closed form; set entropy_coef to 0, or distribution"):
        next(trainer.iterate())


def test_native_is_sync():
    """CartPole's own vector environment and SyncVectorEnv reset and record episodes in the same way."""
    for mode in ("auto", "sync"):
        experiment, trainer = build("CartPole-v1", dict(vectorization=mode, num_envs=4, steps=64))
        assert isinstance(experiment.environments.env.unwrapped, SyncVectorEnv) is (mode == "sync")
        rollout = trainer.collector.collect(trainer.algorithm.networks.policy)
        mask, done = rollout.data["mask"], rollout.data["done"]
        # every end, except in the last column, is followed by one masked step
        assert torch.equal(~mask[:, 1:], done[:, :-1]) and mask[:, 0].all()
        assert rollout.data["step_score"][mask].eq(1).all()
        assert rollout.metrics["length"] == rollout.metrics["return"]


@pytest.mark.parametrize(
    ("env", "settings"),
    [("CartPole-v1", {}), ("Pendulum-v1", dict(normalize_observation=True, normalize_reward=True))],
    ids=["discrete", "normalized"],
)
def test_resumed_equals_uninterrupted(env, settings, tmp_path):
    """A run resumed from a checkpoint gives the same weights, statistics and rewards, to the bit."""
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
        assert same(
            weights(whole[1].algorithm.networks.trained[name]), weights(resumed[1].algorithm.networks.trained[name])
        )
    assert whole[0].environments.state_dict() == resumed[0].environments.state_dict()
    assert whole[0].evaluate(whole[1].algorithm.networks.policy) == resumed[0].evaluate(
        resumed[1].algorithm.networks.policy
    )


def test_same_seed_same_run_other_seed_another():
    """A run depends on its seed and not on global randomness."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # global randomness must not matter
        _, trainer = build("CartPole-v1", seed=seed, iterations=1)
        list(trainer.iterate())
        runs.append(weights(trainer.algorithm.networks.actor))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_evaluation_does_not_change_the_run():
    """Evaluation uses the run's normalizer statistics, does not update them, and repeats the same episodes."""
    experiment, trainer = build("Pendulum-v1", dict(normalize_observation=True, normalize_reward=True))
    next(trainer.iterate())
    before = experiment.environments.state_dict()
    first, second = (experiment.evaluate(trainer.algorithm.networks.policy) for _ in range(2))
    assert first == second and len(first.returns) == 4 and set(first.lengths) == {200}
    assert experiment.environments.state_dict() == before and before["observation"]["count"] > 10
    # raw rewards: normalized ones would sum to far less
    assert np.mean(first.returns) < -200


def test_evaluation_is_deterministic():
    """An evaluation return equals that of the deterministic policy in a single environment stepped by hand."""
    experiment, trainer = build("CartPole-v1")
    evaluation, env = run_episodes(experiment.environments, trainer.algorithm.networks.policy), gym.make("CartPole-v1")
    observation, _ = env.reset(seed=1_000_000)
    total, ended = 0.0, False
    while not ended:
        action = int(trainer.algorithm.networks.policy.greedy(torch.as_tensor(observation)[None])[0])
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    # the native vector environment samples initial states differently, so the comparison needs a sync one
    sync, _ = build("CartPole-v1", dict(vectorization="sync"))
    assert sync.evaluate(trainer.algorithm.networks.policy).returns[0] == total
    assert len(evaluation.returns) == 3


class Endless(Steps):
    """An episode that never ends."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, False, False, {}


gym.register("Endless-v0", Endless)


def test_endless_evaluations_are_refused(monkeypatch):
    """An evaluation episode that does not end raises an error that asks for a time limit."""
    monkeypatch.setattr("agents.control.experiment.LONGEST", 20)
    experiment, trainer = build("Endless-v0")
    with pytest.raises(ValueError, match=r"4 of 4 episodes had not ended after 20 steps.*max_episode_steps=1000"):
        experiment.evaluate(trainer.algorithm.networks.policy)
    for unlimited in ("-1", "null"):
        experiment, trainer = build("Endless-v0", env_arg=(f"max_episode_steps={unlimited}",))
        assert experiment.environments.limit is None
    experiment, trainer = build("Endless-v0", env_arg=("max_episode_steps=7",))
    assert experiment.evaluate(trainer.algorithm.networks.policy).lengths == [7] * 4


@pytest.mark.parametrize("limit", [True, False], ids=["cut-off", "terminated"])
def test_normalized_returns_end_with_their_episodes(limit):
    """Rewards are divided by the standard deviation of discounted returns, which stop at episode ends."""
    experiment, _ = build("Steps-v0", dict(normalize_reward=True, num_envs=1), env_arg=(f"limit={str(limit).lower()}",))
    environments, returns, total = experiment.environments, [], 0.0
    environments.reset(0)
    for step in range(40):
        environments.env.step(np.zeros(1, np.int64))
        reward = [11.0, 12.0, 13.0, 0.0][step % 4]
        if step % 4 == 3:
            continue  # a reset step
        total = 0.99 * total + reward
        returns.append(total)
        total = 0.0 if step % 4 == 2 else total
    assert environments.rewards is not None
    assert float(environments.rewards.return_rms.var) == pytest.approx(np.var(returns), rel=1e-2)


def test_normalized_values_are_clipped():
    """Normalized observations and rewards stay within ±10, early statistics included."""
    _, trainer = build("MountainCar-v0", dict(normalize_observation=True, normalize_reward=True))
    data = trainer.collector.collect(trainer.algorithm.networks.policy).data
    assert data["observation"].abs().max() <= 10
    assert data["step_score"].min() == -10  # the first rewards are equal, so their standard deviation is near 0


def test_episodes_fit_between_checkpoints():
    """Checkpoints closer together than the time limit are refused, with a value that works."""
    with pytest.raises(ValueError, match=r"last up to 500 steps.*32 steps apart; set checkpoint_every to at least 32"):
        build("CartPole-v1", iterations=9, checkpoint_every=2)


def test_returns_are_summed_exactly():
    """Float32 rewards are summed in float64, across rollouts."""
    env = Returns(SyncVectorEnv([Tenths]))
    env.reset(seed=0)
    for _ in range(3):
        for _ in range(1000):
            env.step(np.zeros(1, np.int64))
        episodes = env.take()
    assert [episode.length for episode in episodes] == [2500]
    assert episodes[0].total == pytest.approx(2500 * float(np.float32(0.1)), rel=1e-12)


class Tenths(gym.Env):
    """2,500 steps with a float32 reward of 0.1."""

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
    """Networks accept one state, none, or any batch shape."""
    _, trainer = build("CartPole-v1")
    assert trainer.algorithm.networks.policy(torch.zeros(shape)).shape == (*shape[:-1], 2)


def test_environments_of_a_module(tmp_path, monkeypatch):
    """`module:id` imports the module that registers the environment, as in gym.make, and finds its presets."""
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


@pytest.mark.slow
def test_short_cartpole_run_learns(tmp_path):
    """With the preset and fewer frames, PPO's return on CartPole-v1 rises to several times a random policy's."""
    config, settings, algorithm = defaults("CartPole-v1", "ppo")
    short = dict(vars(config), run=str(tmp_path / "run"), iterations=60)
    summary = run.train(TrainConfig(**short), settings, algorithm)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    returns = [row["return"] for row in rows if "return" in row]
    assert np.mean(returns[:3]) < 40 and np.mean(returns[-5:]) > 100
    assert summary["return_after"] > 150
    assert {"return_before", "return_std_after", "frames", "frames_per_second", "seconds"} <= set(summary)
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000


SECONDS = {"a2c", "dqn", "sac"}  # they take many


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SECONDS))
        for name in sorted(ALGORITHMS)
        if name not in ("rloo", "grpo")
    ],
)
def test_every_algorithm_learns_cartpole(name):
    """Each algorithm without groups trains on CartPole-v1, and its return rises."""
    config, settings, algorithm = defaults("CartPole-v1", name)
    iterations = {"ppo": 30, "dqn": 70, "sac": 70, "a2c": 600}.get(name, 40)
    if not find_algorithm(name)[1].on_policy:  # the preset's 128 updates take half a minute
        settings = dataclasses.replace(settings, hidden=(64, 64))
        faster = {"epsilon_updates": 500, "target_update_interval": 64} if name == "dqn" else {"tau": 0.02}
        algorithm = dataclasses.replace(algorithm, gradient_steps=32, learning_starts=256, **faster)
    _, trainer = run.build(dataclasses.replace(config, iterations=iterations), settings, algorithm)
    returns = [iteration.metrics["return"] for iteration in trainer.iterate() if "return" in iteration.metrics]
    assert np.mean(returns[:2]) < 40 and np.mean(returns[-5:]) > 60


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_groups_are_of_text(name):
    """RLOO and GRPO, which compare responses to one prompt, refuse other environments, and speak of no prompts."""
    with pytest.raises(ValueError, match=r"^(?!.*prompt).*from one starting state.*choose an algorithm with a critic"):
        run.build(*defaults("CartPole-v1", name))


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_continuous_actions_need_a_gaussian(name):
    """DQN and SAC, which learn a value for every action, refuse continuous actions."""
    with pytest.raises(
        ValueError, match=r"value for each of a list of actions.*choose an algorithm with a Gaussian policy"
    ):
        run.build(*defaults("Pendulum-v1", name))


@pytest.mark.parametrize("env", sorted(PRESETS))
def test_presets_open(env):
    """Every preset has valid settings and opens its environment."""
    if env.startswith("LunarLander"):
        pytest.importorskip("Box2D")
    for algorithm in PRESETS[env]:
        config, settings, algorithm_config = defaults(env, algorithm)
        assert config.env == env and config.algorithm == algorithm
        if env != "TextGen-v0":
            run.build(config, settings, algorithm_config)


class Odd(gym.Env):
    """An environment with an unsupported action space."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, kind: str = "multi") -> None:
        unbounded = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([2, 2]) if kind == "multi" else unbounded


gym.register("Odd-v0", Odd)

IMAGE = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
SEEN = {
    "sequence": gym.spaces.Sequence(gym.spaces.Box(-1, 1, (2,))),
    "graph": gym.spaces.Graph(gym.spaces.Box(-1, 1, (2,)), None),
    "image": IMAGE,
    "gray": gym.spaces.Box(0, 255, (8, 8), np.uint8),
    "inside": gym.spaces.Dict(camera=IMAGE, speed=gym.spaces.Box(-1, 1, (1,))),
    "matrix": gym.spaces.Box(-1, 1, (2, 3)),
    "mixed": gym.spaces.Dict(phase=gym.spaces.Discrete(3), flags=gym.spaces.MultiBinary(4)),
}
IMAGES = ("image", "gray", "inside")
SYNC = dict(vectorization="sync")


class Seen(gym.Env):
    """An environment with observations of many kinds, and no episode of interest."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, kind="matrix"):
        self.observation_space = SEEN[kind]

    def reset(self, *, seed=None, options=None):
        """Start."""
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        """End at once."""
        return self.observation_space.sample(), 0.0, True, False, {}


gym.register("Seen-v0", Seen)
gym.register("FlatPixels-v0", lambda: gym.wrappers.FlattenObservation(Seen("image")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(env="Odd-v0"),
            r"support Discrete actions that start at 0 and flat Box actions, got MultiDiscrete.*TransformAction",
        ),
        (
            dict(env="Odd-v0", env_arg=("kind=box",), settings=dict(distribution="tanh")),
            "tanh squashes actions into bounds.*set distribution to gaussian",
        ),
        (dict(env="CartPole-v1", env_arg=("gravity=1",)), "gym.make_vec cannot make 'CartPole-v1'.*gravity"),
        (dict(env="Nowhere-v3"), "cannot make 'Nowhere-v3'"),
        (
            dict(env="CartPole-v1", env_arg=('vector_kwargs={"autoreset_mode": "same_step"}',), settings=SYNC),
            "gym.make_vec cannot make 'CartPole-v1': 'same_step' is not a valid AutoresetMode",
        ),
        (
            dict(env="CartPole-v1", env_arg=('vector_kwargs={"autoreset_mode": "SameStep"}',), settings=SYNC),
            "does not reset in the step after an episode ends.*leave autoreset_mode out",
        ),
        *(
            (dict(env="Seen-v0", env_arg=(f"kind={kind}",)), "read vectors of one width")
            for kind in ("sequence", "graph")
        ),
        *((dict(env="Seen-v0", env_arg=(f"kind={kind}",)), "hold images.*FlattenObservation") for kind in IMAGES),
    ],
)
def test_environments_that_cannot_be_learned_on(arguments, message):
    """Unsupported environments are refused before any work."""
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_envs=0), "num_envs must be at least 1, got 0"),
        (dict(hidden=(64, 0)), r"hidden must hold widths of at least 1, got \(64, 0\)"),
        (dict(activation="gelu"), "activation must be one of tanh, relu, got 'gelu'"),
        (dict(distribution="beta"), "distribution must be one of gaussian, tanh, got 'beta'"),
        (dict(vectorization="ray"), "vectorization must be one of auto, sync, async, got 'ray'"),
        (dict(initial_log_std=3.0), r"initial_log_std must lie in \[-20.0, 2.0\].*got 3.0"),
        (dict(reward_gamma=1.5), r"reward_gamma must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings(changes, message):
    """Bad settings are refused with the value and the valid range."""
    with pytest.raises(ValueError, match=message):
        ControlConfig(**changes)


@pytest.mark.parametrize(("env", "inputs"), [("Seen-v0", 6), ("FlatPixels-v0", 192)])
def test_what_is_a_vector_is_flattened(env, inputs):
    """A small matrix is flattened, and pixels are where a wrapper says so."""
    experiment, trainer = build(env, dict(num_envs=1, steps=4))
    assert experiment.network_factory.inputs == inputs
    next(trainer.iterate())


def test_frames_and_resets_add_up():
    """The first line promises at most as many frames as there are steps; the last says how many only reset."""
    experiment, trainer = build("Seen-v0", dict(num_envs=2, steps=8), iterations=2)
    assert "up to 32 frames (a step that only resets an environment is none)" in experiment.describe()
    list(trainer.iterate())
    summary = dict(return_before=0.0, return_after=0.0, return_std_after=0.0, evaluation_episodes=1, seconds=1.0)
    summary |= dict(frames=trainer.steps, iterations=2, frames_per_second=1.0)
    assert trainer.steps == 16  # every other step resets
    lines = experiment.result_lines(summary, Path("run"))
    assert "16 frames (and 16 steps that reset an environment)" in lines[1]


@pytest.mark.parametrize("name", ["observation", "reward"])
def test_numbers_that_are_not_finite_are_named(name):
    """An environment's infinite or missing number is named with row and step, before anything learns from it."""
    _, trainer = build("CartPole-v1", dict(num_envs=2, steps=4))
    env, steps = trainer.collector.environments.env.env, []
    step = env.step

    def spoilt(actions):
        steps.append(1)
        result = list(step(actions))
        if len(steps) == 3:
            place = {"observation": 0, "reward": 1}[name]
            result[place] = result[place].copy()
            result[place][1] = np.nan
        return tuple(result)

    env.step = spoilt
    expected = f"environment's {name} is nan in row 1 at step {3 if name == 'observation' else 2} of the rollout"
    with pytest.raises(ValueError, match=expected):
        next(trainer.iterate())
