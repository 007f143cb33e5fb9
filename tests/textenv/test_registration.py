"""Registration and specs: every way to make the environment, and specs that travel as JSON and pickles."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import textenv
from tests.support import tiny
from tests.support.faces import assert_same, random_tokens
from textenv.config import TextGenConfig
from textenv.env import TextGenEnv
from textenv.vector_env import TextGenVectorEnv

ROOT = Path(__file__).parents[2]


def length_reward(prompts, responses):
    """The number of characters."""
    return [float(len(response)) for response in responses]


def some_prompts():
    """Prompts by name."""
    return [{"prompt": "one", "weight": 1}, {"prompt": "two", "weight": 2}, {"prompt": "three", "weight": 0.5}]


@pytest.fixture
def kind():
    """One architecture: nothing here depends on it."""
    return "gpt2"


@pytest.fixture
def quick(settings):
    """A small task whose arguments are names and numbers."""
    return {**settings, "reward": "tests.textenv.test_registration:length_reward", "max_new_tokens": 4}


def python(code, *arguments):
    """Runs code in a fresh interpreter and returns what it printed last, from JSON."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# ---- making


def test_make_by_module_name(quick):
    """`textenv:` in the id imports the package, for make and make_vec; without it nothing is registered."""
    code = """
import json, sys
import gymnasium as gym
settings = json.loads(sys.argv[1])
try:
    gym.make("TextGen-v0")
except gym.error.NameNotFound as error:
    unknown = str(error)
assert "textenv" not in sys.modules
env = gym.make("textenv:TextGen-v0", **settings)
vector = gym.make_vec("textenv:TextGen-v0", num_envs=2, **settings)
print(json.dumps([unknown, env.spec.id, vector.spec.id, type(vector).__name__, len(vector.reset(seed=0)[0])]))
"""
    unknown, *found = python(code, json.dumps(quick))
    assert "TextGen" in unknown and found == ["TextGen-v0", "TextGen-v0", "TextGenVectorEnv", 2]


def test_register_envs(quick):
    """`gym.register_envs(textenv)` is welcome, and the id is known as `TextGen-v0`."""
    gym.register_envs(textenv)
    assert gym.spec("TextGen-v0").vector_entry_point == "textenv.vector_env:TextGenVectorEnv"
    assert isinstance(gym.make("TextGen-v0", **quick).unwrapped, TextGenEnv)


def test_make_vec_modes(quick):
    """The native environment by default; sync and async on request; all play the same episodes."""
    async_kwargs = {"context": "fork"}
    native = gym.make_vec("TextGen-v0", num_envs=2, **quick)
    named = gym.make_vec("TextGen-v0", 2, "vector_entry_point", autoreset_mode="NextStep", **quick)
    sync = gym.make_vec("TextGen-v0", 2, "sync", **quick)
    processes = gym.make_vec("TextGen-v0", 2, "async", vector_kwargs=async_kwargs, **quick)
    envs = [native, named, sync, processes]
    assert [type(env) for env in envs] == [TextGenVectorEnv, TextGenVectorEnv, SyncVectorEnv, AsyncVectorEnv]
    try:
        resets = [env.reset(seed=4) for env in envs]
        for other in resets[1:]:
            assert_same(other, resets[0], "reset")
        for step, actions in enumerate(random_tokens(8, 2)):
            answers = [env.step(actions) for env in envs]
            for other in answers[1:]:
                assert_same(other, answers[0], f"step {step}")
    finally:
        processes.close()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled", "NEXT_STEP", AutoresetMode.SAME_STEP])
def test_autoreset_mode_is_a_name_or_the_enum(quick, mode):
    """The metadata holds the enum that Gymnasium's wrappers look for, and the class's own is left alone."""
    env = gym.make_vec("TextGen-v0", num_envs=2, autoreset_mode=mode, **quick)
    assert isinstance(env.metadata["autoreset_mode"], AutoresetMode)
    assert TextGenVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


def test_what_gymnasium_refuses(quick):
    """`vector_kwargs` and `wrappers` belong to sync and async: Gymnasium says so for the native environment."""
    with pytest.raises(gym.error.Error, match="vector_kwargs"):
        gym.make_vec("TextGen-v0", 2, vector_kwargs={"autoreset_mode": "SameStep"}, **quick)
    with pytest.raises(gym.error.Error, match="wrappers"):
        gym.make_vec("TextGen-v0", 2, wrappers=[gym.wrappers.FlattenObservation], **quick)


def test_unknown_arguments(quick):
    """A misspelt argument is named with the one that was meant and those there are."""
    for make in (gym.make, gym.make_vec):
        with pytest.raises(
            TypeError, match=r"no argument 'kl_coeff'; did you mean 'kl_coef'. It takes reference, reward"
        ):
            make("TextGen-v0", **quick, kl_coeff=0.1)
    with pytest.raises(TypeError, match=r"no argument 'zzz'\. It takes .*max_new_tokens.* and render_mode\."):
        gym.make("TextGen-v0", **quick, zzz=1)


# ---- specs


def every_argument(tmp_path, folders):
    """Settings that between them give every argument, in all the forms that JSON can carry."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b c", "answer": 2}\n')
    ensemble = tmp_path / "ensemble"
    for member in range(2):
        shutil.copytree(folders["gpt2_reward"], ensemble / f"member-{member}", dirs_exist_ok=True)
    common = dict(reference=folders["gpt2"], max_prompt_tokens=8, max_new_tokens=4, device="cpu")
    reward = "tests.textenv.test_registration:length_reward"
    return [
        dict(
            common,
            reward={reward: 0.5, folders["gpt2_reward"]: 2.0},
            prompts="tests.textenv.test_registration:some_prompts",
            prompt_sampling="weighted",
            group_size=2,
            kl_coef=0.2,
            temperature=1.5,
            stop_token_ids=(tiny.END, 65),
            dtype="float32",
            render_mode="ansi",
            reward_timeout=60.0,
            score_normalization="fixed",
            score_mean=1.5,
            score_std=2,
            score_clip=3.0,
        ),
        dict(common, reward=folders["gpt2_reward"], prompts=str(lines), prompt_sampling="prioritized", kl_coef=0),
        dict(common, reward=str(ensemble), prompts=str(lines), reward_ensemble="min"),
        dict(common, reward=reward, prompts=some_prompts(), prompt_sampling="shuffle", max_episode_steps=3),
        dict(
            common,
            reward=reward,
            prompts=["a", "b"],
            reward_label=None,
            chat=False,
            chat_template_kwargs=None,
            action_mask=["special", "top_k:9"],
        ),
    ]


def episodes(env, seed=5):
    """What an environment shows over several episodes."""
    shown = [env.reset(seed=seed)]
    for token in random_tokens(14, 1, seed=1)[:, 0]:
        shown.append(env.step(token))
        if shown[-1][2] or shown[-1][3]:
            shown.append(env.reset())
    return shown


def assert_same_episodes(one, other):
    """The same answers, in the same order."""
    for step, (got, wanted) in enumerate(zip(episodes(one), episodes(other), strict=True)):
        assert_same(got, wanted, f"answer {step}")


@pytest.mark.parametrize("which", range(4))
def test_spec_to_json_and_back(tmp_path, folders, which):
    """A spec that went through JSON, or a pickle, makes an environment that plays the same episodes."""
    settings = every_argument(tmp_path, folders)[which]
    env = gym.make("TextGen-v0", **settings)
    spec = EnvSpec.from_json(env.spec.to_json())
    for again in (gym.make(spec), spec.make(), pickle.loads(pickle.dumps(env.spec)).make()):
        assert again.spec.max_episode_steps == settings.get("max_episode_steps")
        assert again.unwrapped.render_mode == settings.get("render_mode")
        assert_same_episodes(again, env)


def test_every_argument_was_given(tmp_path, folders):
    """The test above leaves no argument out."""
    given = {name for settings in every_argument(tmp_path, folders) for name in settings}
    assert set(TextGenConfig.__dataclass_fields__) - given <= set()


def test_vector_spec_to_json_and_back(quick):
    """The vector environment's spec too: rows, mode and limit come back."""
    quick = {**quick, "autoreset_mode": "SameStep", "max_episode_steps": 3, "prompt_sampling": "shuffle"}
    env = gym.make_vec("TextGen-v0", num_envs=3, **quick)
    again = gym.make_vec(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, TextGenVectorEnv) and again.num_envs == 3
    assert again.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert_same(again.reset(seed=1), env.reset(seed=1), "reset")
    for actions in random_tokens(10, 3):
        assert_same(again.step(actions), env.step(actions), "step")


def test_live_objects_have_no_json(quick):
    """Live objects work, bare or shared; JSON cannot hold them, and Gymnasium says so. A pickle can."""
    for reward in (length_reward, textenv.shared(length_reward)):
        env = gym.make("TextGen-v0", **{**quick, "reward": reward})
        with pytest.raises(TypeError, match="not JSON serializable"):
            env.spec.to_json()
        assert_same_episodes(pickle.loads(pickle.dumps(env.spec)).make(), env)


def test_registered_under_another_name(quick):
    """A user's own id with arguments of its own is made with them, single and native."""
    name = "tests/OneWord-v3"
    entry = gym.spec("TextGen-v0")
    kwargs = {**quick, "prompts": ["word"]}
    gym.register(
        name, entry.entry_point, vector_entry_point=entry.vector_entry_point, max_episode_steps=2, kwargs=kwargs
    )
    try:
        env, vector = gym.make(name), gym.make_vec(name, num_envs=2)
        env.reset(seed=0)
        vector.reset(seed=0)
        assert [env.step(200)[3] for _ in range(2)] == [False, True]
        assert [vector.step(np.array([200, 200]))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
        assert env.unwrapped.task.prompts.texts == ("word",)
    finally:
        del gym.registry[name]


MEMORY = """
import ctypes, gc, json, sys
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # blocks of 64 KB and more go back to the system when they are freed
import gymnasium as gym
import psutil, torch
from transformers import GPT2Config, GPT2LMHeadModel
import textenv
from tests.support import tiny

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

def language_model(width):
    config = GPT2Config(n_embd=width, n_layer=1, n_head=1, n_positions=64, vocab_size=300 * width, eos_token_id=256)
    model = GPT2LMHeadModel(config).eval()
    return textenv.LanguageModel(model, tiny.tokenizer(), (256,))

def make(given):
    settings = dict(reward="tests.textenv.test_registration:length_reward", prompts=["a"], device="cpu", max_prompt_tokens=8)
    return gym.make("TextGen-v0", reference=given, max_new_tokens=8, **settings)

warm = make(textenv.shared(language_model(256)))
warm.spec, warm.reset(seed=0), warm.step(65)
model = language_model(256)
size = sum(parameter.nbytes for parameter in model.model.parameters())
costs = []
for given in (textenv.shared(model), model):
    before = resident()
    env = make(given)
    spec = env.spec
    costs.append((resident() - before) / size)
print(json.dumps([size, *costs]))
"""


def test_shared_models_cost_their_memory_once():
    """`make` plus `env.spec` with a shared model: at most 1.05 times the model itself, measured. Bare, copies are made."""
    size, shared, bare = python(MEMORY)
    assert size > 70e6
    assert shared <= 0.05, f"{shared:.3f} of the model's {size / 1e6:.0f} MB on top of it"
    assert bare > 0.9  # the measurement sees a copy where there is one
