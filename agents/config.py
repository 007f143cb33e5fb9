"""The settings of a training run that every algorithm and every environment share, validated once."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained on what, how long, and where it is written.

    An algorithm's own settings are its own, and so are those of text (`TextConfig`) and of other environments
    (`ControlConfig`).
    """

    env: str = "TextGen-v0"  # Gymnasium id of the environment, or module:id of a module that registers it
    env_arg: tuple[str, ...] = ()  # NAME=VALUE for gym.make, as kl_coef=0.05; VALUE is JSON, Python or plain text
    algorithm: str = "ppo"  # the learner's name
    seed: int = 0  # of everything random in the run
    run: str | None = None  # folder to write; default runs/ENV-ALGORITHM-seedN-DATE
    resume: bool = False  # go on with the run in that folder
    iterations: int = 30  # rollouts, each followed by its updates
    minibatch_size: int = 32  # responses, or steps of another environment, in an optimizer step
    learning_rate: float = 1e-4  # of the actor
    critic_learning_rate: float = 3e-4  # of critics and Q-networks
    schedule: str = "linear"  # of both learning rates: linear, falling to zero, or constant
    max_grad_norm: float = 1.0  # of each network's gradient; larger ones are scaled down
    checkpoint_every: int = 10  # iterations between checkpoints; the last one is always kept

    def __post_init__(self) -> None:
        check_counts(self, ("iterations", "minibatch_size", "checkpoint_every"))
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        check_choice(self, "schedule", SCHEDULES)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 or more and below 2^32, got {self.seed}.")
        if self.resume and self.run is None:
            raise ValueError("resume needs the folder of the run to go on with; give it by --run.")
        self.env_arguments()

    def env_arguments(self) -> dict[str, Any]:
        """`env_arg` as keyword arguments of gym.make: JSON, numbers and words of Python, or plain strings."""
        arguments = {}
        for item in self.env_arg:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--env-arg takes NAME=VALUE, got {item!r}; for instance kl_coef=0.05.")
            arguments[name] = _value(value)
        return arguments


def id_of(env: str) -> str:
    """An environment's id without the module that registers it: `module:Name-v0` is Name-v0, as for gym.make."""
    return env.rpartition(":")[2]


def check_counts(config: Any, names: Sequence[str]) -> None:
    """Refuses counts below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def check_choice(config: Any, name: str, values: Sequence[str]) -> None:
    """Refuses a word that is none of `values`."""
    if getattr(config, name) not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(config, name)!r}.")


def check_shares(config: Any, names: Sequence[str]) -> None:
    """Refuses numbers outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(config, name)}.")


def check_not_negative(config: Any, names: Sequence[str]) -> None:
    """Refuses numbers below 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}.")


def _value(text: str) -> Any:
    """JSON, or a number, True, False or None as Python writes them (.05 is no JSON); anything else is the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval documents
        return text
    # An underscore is rather of a name, as in reference=2024_01, than between digits.
    return value if isinstance(value, int | float | None) and "_" not in text else text
