"""Gymnasium's, Stable-Baselines3's and TorchRL's checkers are silent over a grid of configurations."""

from __future__ import annotations

import os
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import VectorEnv
from torchrl.envs.utils import check_env_specs
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support import tiny
from textenv import TextGenConfig, build_task
from textenv.torchrl_env import TextGenTorchEnv


def length(prompts, responses):
    """A reward without a model."""
    return [float(len(text)) for text in responses]


# TEXTENV_MODEL=folder adds a causal language model of anybody's to the grid.
MODELS = [os.environ["TEXTENV_MODEL"]] if "TEXTENV_MODEL" in os.environ else []


@pytest.fixture(scope="module", params=[300, 1_000, 50_257, "embedded", *MODELS])
def vocabulary(request, tmp_path_factory):
    """Settings of a task with so many tokens, of the embedded one, or of a model in a folder."""
    if request.param == "embedded":
        return dict(max_new_tokens=3, device="cpu")
    if request.param in MODELS:
        short = dict(max_prompt_tokens=16, max_new_tokens=3, device="cpu")
        return dict(reference=request.param, reward="tests.textenv.test_checkers:length", prompts=tiny.PROMPTS) | short
    torch.manual_seed(0)
    sizes = tiny.GPT2 | dict(n_embd=8, n_layer=1, n_head=2, vocab_size=request.param)
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=tiny.END, pad_token_id=tiny.PAD, bos_token_id=None))
    folder = tiny.save(model, tmp_path_factory.mktemp("wide"))
    short = dict(max_prompt_tokens=16, max_new_tokens=3, device="cpu")
    return dict(reference=folder, reward="tests.textenv.test_checkers:length", prompts=tiny.PROMPTS) | short


@pytest.fixture(params=[None, ["special", "top_k:5"]], ids=["free", "masked"])
def configuration(request, vocabulary):
    """With and without action masks."""
    return vocabulary | {"action_mask": request.param}


@pytest.fixture(autouse=True)
def strict():
    """Any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own use of what it has deprecated itself
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|tensordict|torchrl")
        yield


def test_gymnasium(configuration):
    """`check_env` finds nothing to say."""
    check_env(gym.make("TextGen-v0", **configuration).unwrapped, skip_render_check=True)


def test_stable_baselines(configuration):
    """SB3's `check_env` finds nothing to say."""
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(gym.make("TextGen-v0", **configuration).unwrapped, skip_render_check=True)


def test_torchrl(configuration):
    """`check_env_specs` finds nothing to say."""
    check_env_specs(TextGenTorchEnv(build_task(TextGenConfig(**configuration)), 2))


# An async environment starts processes that import PyTorch, about 20 s of CPU time: the whole grid is for test-slow.
@pytest.mark.parametrize("mode", ["vector_entry_point", "sync", pytest.param("async", marks=pytest.mark.slow)])
def test_vector_environments(configuration, mode):
    """In every vectorization, observations lie in the space and arrays have Gymnasium's types and shapes."""
    check_vector_environment(configuration, mode)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [300], indirect=True)
@pytest.mark.parametrize("configuration", [["special", "top_k:5"]], ids=["masked"], indirect=True)
def test_async_vector_environment(configuration):
    """One configuration of the async grid: a small vocabulary with action masks."""
    check_vector_environment(configuration, "async")


def check_vector_environment(configuration, mode):
    env: VectorEnv = gym.make_vec("TextGen-v0", num_envs=2, vectorization_mode=mode, **configuration)
    try:
        observation, infos = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(5):
            assert env.observation_space.contains(observation)
            masked = configuration["action_mask"] is not None
            assert masked == ("action_mask" in infos)
            if masked:
                assert infos["action_mask"].dtype == np.int8 and infos["_action_mask"].all()
            observation, reward, terminated, truncated, infos = env.step(env.action_space.sample())
            assert reward.dtype == np.float64 and reward.shape == (2,) and np.isfinite(reward).all()
            assert terminated.dtype == truncated.dtype == np.bool_
    finally:
        env.close()
