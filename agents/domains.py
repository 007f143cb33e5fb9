"""The domain of a Gymnasium id, text or control, which decides how it is learned on."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from agents.config import TrainConfig, id_of
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.interfaces import Experiment
from agents.ranks import ALONE, Ranks
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment, reopen_text
from textenv.config import NAMES, TextGenConfig
from textenv.env import TextGenEnv

BYPASSED = ("reset", "step", "action_masks")  # methods of TextGenEnv that the learners never call


@dataclass(frozen=True)
class Domain:
    """A kind of environment: its settings, and the functions that open one for learning, and that of a run again."""

    settings: type
    open: Callable[[TrainConfig, Any, Ranks], Experiment]
    reopen: Callable[[TrainConfig, Any, Path], Experiment]  # Path: the run's folder


def open_text(config: TrainConfig, settings: TextConfig, ranks: Ranks) -> TextExperiment:
    """Open an environment of text."""
    return TextExperiment(config, settings, ranks=ranks)


def open_control(config: TrainConfig, settings: ControlConfig, ranks: Ranks = ALONE) -> ControlExperiment:
    """Open an environment of vectors. Raises ValueError if the environment turns out to be text."""
    check_not_text(config)
    return ControlExperiment(config, settings, ranks)


TEXT = Domain(TextConfig, open_text, reopen_text)
CONTROL = Domain(ControlConfig, open_control, lambda config, settings, folder: open_control(config, settings))


def domain_of(env: str) -> Domain:
    """The domain of a Gymnasium id: TEXT if its class is TextGenEnv or derives from it, else CONTROL.

    Raises ValueError for an unknown id, and for a text environment that the learners would not run as written.
    """
    entry_point = entry_point_of(env)
    if not (isinstance(entry_point, type) and issubclass(entry_point, TextGenEnv)):
        return CONTROL
    check_overrides(env, entry_point)
    return TEXT


def arguments_of(config: TrainConfig) -> dict[str, Any]:
    """The arguments of `gym.make` in a configuration, where text environments take names of files as texts."""
    return config.env_arguments(texts=NAMES if domain_of(config.env) is TEXT else ())


def environment_settings(config: TrainConfig) -> TextGenConfig:
    """The settings of a text environment: its class's, its registration's, and those of `env_arg`."""
    parameters = inspect.signature(entry_point_of(config.env)).parameters.values()
    values = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    values |= gym.spec(id_of(config.env)).kwargs | arguments_of(config)
    known = {field.name for field in fields(TextGenConfig)}
    return TextGenConfig(**{name: value for name, value in values.items() if name in known})


def entry_point_of(env: str) -> Any:
    """The class or function that `gym.make` calls for an id; None where only a vector environment is registered."""
    try:
        if id_of(env) != env:  # `module:id` imports the module, as in gym.make
            module = env.rpartition(":")[0]
            if "" in module.split("."):
                raise ImportError(f"{module!r} names no module; write MODULE:ID, such as my_package.envs:MyEnv-v0")
            importlib.import_module(module)
        entry_point = gym.spec(id_of(env)).entry_point
        return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    except (gym.error.Error, ImportError, AttributeError) as error:
        raise ValueError(f"gym.make cannot make {env!r}: {error}") from error


def check_overrides(env: str, kind: type[TextGenEnv]) -> None:
    """Refuse a subclass that overrides a method the learners bypass: its change would be ignored without a word."""
    overridden = [name for name in BYPASSED if getattr(kind, name) is not getattr(TextGenEnv, name)]
    if overridden:
        raise ValueError(
            f"the class of {env!r}, {kind.__name__}, overrides {', '.join(overridden)}, but the learners write whole "
            f"responses in one pass and never call {', '.join(BYPASSED)}. Express the change through the arguments "
            "reward, prompts or action_mask, or train with a library that steps Gymnasium environments."
        )


def check_not_text(config: TrainConfig) -> None:
    """Refuse an entry point that is a function and makes a TextGenEnv: only calling it tells."""
    entry_point = entry_point_of(config.env)
    if entry_point is None or isinstance(entry_point, type):
        return
    try:
        env = gym.make(config.env, **config.env_arguments())
    except (gym.error.Error, TypeError, ImportError, LookupError) as error:
        raise ValueError(f"gym.make cannot make {config.env!r}: {error}") from error
    is_text = isinstance(env.unwrapped, TextGenEnv)
    env.close()
    if is_text:
        raise ValueError(
            f"the entry point of {config.env!r} is a function that makes a TextGenEnv, so the learners would treat its "
            "token ids as a vector; register the class itself, and pass the function's arguments as `kwargs`."
        )
