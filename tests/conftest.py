"""Fixtures: tiny models saved once a session, and the settings of a task built on them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support import tiny
from textenv import TextGenConfig, build_task

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def kind(request) -> str:
    """Both architectures: learned and rotary positions."""
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Saved models by name: `gpt2`, `llama`, `gpt2_reward`, `llama_reward`."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name in ("gpt2", "llama"):
        found[name] = tiny.save(tiny.language_model(name), root / name)
        found[f"{name}_reward"] = tiny.save(tiny.reward_model(name), root / f"{name}_reward")
    return found


@pytest.fixture(scope="session")
def models_kept(folders):
    """The frozen GPT-2 models stay in memory from test to test, which so need not read them again."""
    models = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS, device="cpu")
    return build_task(TextGenConfig(**models, max_new_tokens=12))


@pytest.fixture
def settings(folders, kind) -> dict:
    """Arguments of `gym.make` for a small task with ragged prompts."""
    return dict(
        reference=folders[kind],
        reward=folders[f"{kind}_reward"],
        prompts=tiny.PROMPTS,
        kl_coef=0.3,
        max_prompt_tokens=16,
        max_new_tokens=12,
        temperature=0.7,
        device="cpu",
    )
