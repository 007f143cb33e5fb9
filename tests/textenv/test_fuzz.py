"""Arguments of wrong type and range: only ValueError or TypeError with a remedy may come out, or a working task."""

from __future__ import annotations

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.support import tiny
from textenv import LanguageModel, Task, TextGenConfig, build_task, shared
from textenv.env import TextGenEnv
from textenv.vector_env import TextGenVectorEnv

FIELDS = [field.name for field in dataclasses.fields(TextGenConfig)]
MODEL = LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,))


class Odd:
    """An object that nobody expects."""


def ones(prompts, responses):
    """A reward that is always 1."""
    return [1.0] * len(prompts)


BASE = dict(
    reference=shared(MODEL),
    reward=ones,
    prompts=tiny.PROMPTS,
    max_prompt_tokens=16,
    max_new_tokens=3,
    device="cpu",
)
# Never a number so large that an honest environment of that size would fill the memory.
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([-(10**9), 10**6]), st.floats(-4, 4), st.sampled_from([math.nan, math.inf])
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "uniform", "a:b", "os:getcwd", "json:loads", "top_k:3", "missing.jsonl", "./nowhere"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.builds(Odd), st.just(np.float64(2.5)), st.just(b"x"))
JUNK = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.tuples(SCALARS),
    st.dictionaries(st.one_of(WORDS, NUMBERS), SCALARS, max_size=2),
    st.sampled_from([len, print, Odd, np.arange(3), {1, 2}, shared(3), shared(Odd())]),
)
MANY = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def helpful(error: Exception) -> bool:
    """A sentence, not a bare name or number."""
    return len(str(error).split()) >= 4


@MANY
@given(field=st.sampled_from(FIELDS), value=JUNK)
@example(field="max_new_tokens", value=True)
@example(field="stop_token_ids", value=-1)
@example(field="reward", value={"tests.textenv.test_fuzz:ones": "2"})
@example(field="dtype", value=["float32"])
def test_arguments(monkeypatch, field, value):
    """Any value for any argument: a task that plays an episode, or an error in words."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        task = build_task(TextGenConfig(**(BASE | {field: value})))
    except (ValueError, TypeError) as error:
        assert helpful(error), f"{field}={value!r}: {error!r}"
        return
    assert isinstance(task, Task)


@MANY
@given(action=JUNK)
def test_actions(action):
    """Any action: a step, or an error in words; the episode then goes on as if nothing had been tried."""
    env = TextGenEnv(**BASE)
    env.reset(seed=0)
    try:
        env.step(action)
    except (ValueError, TypeError) as error:
        assert helpful(error), f"{action!r}: {error!r}"
        assert math.isfinite(env.step(5)[1])


@MANY
@given(
    value=JUNK, which=st.sampled_from(["seed", "options", "reset_mask", "num_envs", "autoreset_mode", "render_mode"])
)
def test_reset_and_construction(value, which):
    """Any seed, options, number of rows and mode: it works, or it is an error in words."""
    assume(which != "num_envs" or not isinstance(value, int) or value < 100)  # an honest million would fill the memory
    try:
        if which in ("seed", "options", "reset_mask"):
            env = TextGenVectorEnv(2, **BASE)
            env.reset(seed=0)
            arguments = {"options": {"reset_mask": value}} if which == "reset_mask" else {which: value}
            env.reset(**arguments)
        elif which == "num_envs":
            TextGenVectorEnv(value, **BASE)
        else:
            TextGenVectorEnv(2, **{which: value}, **BASE)
    except (ValueError, TypeError, gym.error.Error) as error:
        assert helpful(error), f"{which}={value!r}: {error!r}"


@pytest.mark.parametrize("name", ["reference_", "kl", "max_tokens"])
def test_unknown_arguments(name):
    """A name that the environment does not have is refused."""
    with pytest.raises((TypeError, ValueError), match=name):
        gym.make("TextGen-v0", **{name: 1})
