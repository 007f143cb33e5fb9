"""What a caller has set in torch neither breaks an environment nor changes a number, then or later."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from agents.algorithms.ppo import PPO, PPOConfig
from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.trainer import Trainer
from tests.support.faces import random_tokens
from tests.support.learning import make_trainer, same, weights
from textenv import TextGenConfig, build_task
from textenv.env import TextGenEnv
from textenv.generation import generate, response_kl, response_log_probs, score_responses
from textenv.models.sampling import Sampling
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

one_kind = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
    "anomalies": torch.autograd.detect_anomaly,
}
QUICK = ("inference_mode", "meta")  # the others, and other faces, take longer together than they should
each_ambient = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in AMBIENT]
)


@pytest.fixture
def small(settings):
    """Arguments of a small task with masks of two kinds, per-token logic aside."""
    return {**settings, "max_new_tokens": 4, "action_mask": ["top_k:50", "special"], "score_normalization": "running"}


def single(env, seed):
    """All that one episode of a Gymnasium environment returns, to the bit."""
    return str([pickle.dumps(part) for part in episode(env, seed)])


def episode(env, seed):
    """All that one episode of a Gymnasium environment returns."""
    found = [env.reset(seed=seed), env.action_masks().tolist()]
    for token in random_tokens(4, 1, seed)[:, 0]:
        found.append(env.step(token))
        if found[-1][2]:
            break
    return found


def near(one, other):
    """Equal up to the rounding of float32: where weights lie in memory decides how some processors multiply them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(near, one, other))
    return one == pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(one, float) else np.array_equal(one, other)


def vector(env, seed):
    """All that six steps of a vector environment return, over automatic resets."""
    return str([pickle.dumps(env.reset(seed=seed)), *(pickle.dumps(env.step(t)) for t in random_tokens(6, 2, seed))])


def torchrl(env, seed):
    """All tensors of a TorchRL environment's steps, with their dtypes."""
    env.set_seed(seed)
    data, found = env.reset(), []
    for tokens in random_tokens(3, 2, seed):
        data["action"] = torch.from_numpy(tokens)
        following = env.step(data)["next"]
        found.append(sorted((str(key), str(v.dtype), v.tolist()) for key, v in following.items(True, True)))
        data = following.clone()
    return str(found)


def whole(task, seed):
    """All that the fast path returns."""
    model, prompts = task.load_reference().model, task.read_prompts(["a", "the cat"])
    generation = generate(task, model, prompts, Sampling(temperature=0.7), torch.Generator().manual_seed(seed))
    scored = score_responses(task.with_frozen_statistics(), generation.state, prompts.texts)
    log_prob = response_log_probs(model, generation.state, 0.7)
    tensors = [generation.log_prob, generation.state.input_ids, scored.reward, log_prob]
    tensors.append(response_kl(model, model, generation, 0.7))
    return str([(str(tensor.dtype), tensor.requires_grad, tensor.tolist()) for tensor in tensors])


FACES = {
    "single": (lambda settings: TextGenEnv(**settings), single),
    "vector": (lambda settings: TextGenVectorEnv(2, **settings), vector),
    "torchrl": (lambda settings: TextGenTorchEnv(build_task(TextGenConfig(**settings)), 2), torchrl),
    "generation": (lambda settings: build_task(TextGenConfig(**settings)), whole),
}


@one_kind
@each_ambient
@pytest.mark.parametrize("face", ["single", *(pytest.param(face, marks=pytest.mark.slow) for face in list(FACES)[1:])])
def test_environments(small, models_kept, name, face):
    """An episode under the setting, and the next one without it, equal those that never saw it, to the bit.

    So does an environment that was made under it.
    """
    make, play = FACES[face]
    plain, before, within = make(small), make(small), None
    expected = [play(plain, seed) for seed in range(3)]
    found = [play(before, 0)]
    with AMBIENT[name]():
        found.append(play(before, 1))
        within = make(small)
        started = play(within, 0)
    found.append(play(before, 2))
    assert found == expected
    assert [started, play(within, 1), play(within, 2)] == expected


@one_kind
@each_ambient
def test_learning_on_text(settings, models_kept, name):
    """A run made and begun under the setting has the weights of one that never saw it, to the bit."""
    expected = make_trainer(settings, iterations=2)
    list(expected.iterate())
    with AMBIENT[name]():
        trainer = make_trainer(settings, iterations=2)
        iterations = trainer.iterate()
        next(iterations)
    next(iterations)
    for network in ("actor", "critic"):
        pair = [run.algorithm.networks.trained[network] for run in (expected, trainer)]
        assert same(*map(weights, pair))


@each_ambient
def test_learning_on_control(name):
    """The same on another environment, and for its evaluation."""

    def learn():
        config = TrainConfig(env="CartPole-v1", iterations=1, checkpoint_every=1)
        experiment = ControlExperiment(config, ControlConfig(num_envs=2, steps=16, evaluation_episodes=2))
        trainer = Trainer(config, PPO(PPOConfig(), experiment.network_factory), experiment.collector)
        list(trainer.iterate())
        return weights(trainer.algorithm.networks.actor), experiment.evaluate(trainer.algorithm.networks.actor)

    expected = learn()
    with AMBIENT[name]():
        found = learn()
    assert same(expected[0], found[0]) and expected[1] == found[1]


@one_kind
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"]
)
def test_copies_go_on_alone(small, models_kept, duplicate):
    """A copy in the middle of an episode returns what the original does, and neither disturbs the other."""
    env = TextGenEnv(**small | {"action_mask": ["top_k:50", "regex:[a-z ]*"]})
    env.reset(seed=0)
    env.step(99)
    other = duplicate(env)
    first = [env.step(token) for token in (100, 101)]
    assert near(first, [other.step(token) for token in (100, 101)])
    assert near(episode(env, 3), episode(other, 3))
    assert np.array_equal(env.action_masks(), other.action_masks())
