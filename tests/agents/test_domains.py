"""Which environments count as text, and which text environments the learners refuse."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from agents import run
from agents.domains import CONTROL, TEXT, domain_of
from agents.presets import defaults
from textenv.env import TextGenEnv


class Renamed(TextGenEnv):
    """A subclass that changes only rendering."""

    def render(self):
        return "rendered"


class PaysTwice(TextGenEnv):
    """A subclass with a reward of its own in `step`."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, 2 * reward, terminated, truncated, info


class StartsTwice(TextGenEnv):
    """A subclass with a `reset` of its own."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return super().reset(options=options)


class MaskMixin:
    """A mask that is not among the environment's settings."""

    def action_masks(self):
        return np.ones(3, bool)


class MasksOtherwise(MaskMixin, TextGenEnv):
    """An override that comes from another base class."""


def make_text(**arguments):
    """An entry point that is a function and makes text."""
    return TextGenEnv(**arguments)


def make_cartpole(**arguments):
    """An entry point that is a function and makes another environment."""
    return gym.make("CartPole-v1", **arguments).unwrapped


ENTRY_POINTS = {
    "RenamedClass-v0": Renamed,
    "RenamedString-v0": f"{__name__}:Renamed",
    "PaysTwice-v0": f"{__name__}:PaysTwice",
    "StartsTwice-v0": StartsTwice,
    "MasksOtherwise-v0": MasksOtherwise,
    "TextFunction-v0": make_text,
    "CartPoleFunction-v0": f"{__name__}:make_cartpole",
    "MissingClass-v0": f"{__name__}:Missing",
    "MissingModule-v0": "no_such_module:Missing",
}
for name, entry_point in ENTRY_POINTS.items():
    gym.register(name, entry_point)


@pytest.mark.parametrize("env", ["TextGen-v0", "textenv:TextGen-v0", "RenamedClass-v0", "RenamedString-v0"])
def test_classes_of_text_are_text(env):
    """TextGenEnv and its subclasses are text under any id, registered as a class or as a string."""
    assert domain_of(env) is TEXT


@pytest.mark.parametrize("env", ["CartPole-v1", "CartPoleFunction-v0"])
def test_all_else_is_control(env):
    """Any other class, and any function, is control."""
    assert domain_of(env) is CONTROL


@pytest.mark.parametrize(
    ("env", "method"), [("PaysTwice-v0", "step"), ("StartsTwice-v0", "reset"), ("MasksOtherwise-v0", "action_masks")]
)
def test_overridden_methods_are_refused(env, method):
    """The learners never call these methods, so an override would be ignored silently."""
    with pytest.raises(ValueError, match=rf"{env}.* overrides {method}\b.*write whole responses.*reward.*Gymnasium"):
        domain_of(env)


def test_functions_that_make_text_are_refused():
    """A function that makes a TextGenEnv would be trained on flattened token ids; the remedy is to register the class."""
    with pytest.raises(ValueError, match=r"TextFunction-v0.*function that makes a TextGenEnv.*register the class"):
        run.build(*defaults("TextFunction-v0", "ppo"))


def test_functions_that_make_other_environments_are_learned_on():
    """A function that makes any other environment is accepted."""
    experiment, _ = run.build(*defaults("CartPoleFunction-v0", "ppo"))
    assert experiment.collector.unit == "frames"


@pytest.mark.parametrize(("env", "name"), [("MissingClass-v0", "Missing"), ("MissingModule-v0", "no_such_module")])
def test_broken_entry_points_are_named(env, name):
    """An entry point that cannot be imported is refused before any work."""
    with pytest.raises(ValueError, match=rf"gym.make cannot make '{env}'.*{name}"):
        domain_of(env)


@pytest.mark.parametrize("env", [":", ":x", ".a:x", "a..b:x", "a.:x"])
def test_a_name_of_no_module_is_one_sentence(env):
    """Before Python's import sees it, which would raise errors of other kinds."""
    with pytest.raises(ValueError, match="names no module; write MODULE:ID"):
        domain_of(env)
