"""Which kind of environment an id belongs to, and so how it is learned on: text, or anything else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from agents.config import TrainConfig, id_of
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.interfaces import Experiment
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from textenv.env import TextGenEnv


@dataclass(frozen=True)
class Domain:
    """A kind of environment: the settings it takes, and how one is opened."""

    settings: type
    open: Callable[[TrainConfig, Any], Experiment]


TEXT = Domain(TextConfig, TextExperiment)
CONTROL = Domain(ControlConfig, ControlExperiment)


def domain_of(env: str) -> Domain:
    """The domain of a Gymnasium id. Raises ValueError for an unknown one."""
    try:
        if id_of(env) != env:  # as gym.make does
            importlib.import_module(env.rpartition(":")[0])
        entry = gym.spec(id_of(env)).entry_point
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"gym.make cannot make {env!r}: {error}") from error
    return TEXT if entry in (TextGenEnv, f"{TextGenEnv.__module__}:{TextGenEnv.__qualname__}") else CONTROL
