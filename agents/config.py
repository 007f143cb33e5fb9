"""Settings of a training run that all algorithms and environments share, and checks for all settings."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textenv.settings import check_types
from textenv.unread import Unread

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Environment, algorithm, run length, optimizer and run folder.

    Algorithms, text (`TextConfig`) and other environments (`ControlConfig`) have their own settings. The `UNREAD` of
    all these classes are cases of an `agents.unread.Job` in which a setting would do nothing.
    """

    env: str = "TextGen-v0"  # Gymnasium id, or module:id where importing the module registers it
    env_arg: tuple[str, ...] = ()  # NAME=VALUE for gym.make, e.g. kl_coef=0.05; VALUE is JSON, a Python literal or text
    algorithm: str = "ppo"  # name of the learning algorithm
    seed: int = 0  # seed of all random numbers in the run
    run: str | None = None  # run folder to create; default: runs/ENV-ALGORITHM-seedN-DATE
    resume: bool = False  # resume the run in the folder given by --run
    iterations: int = 30  # number of rollouts, each followed by updates; --resume may raise it if schedule is constant
    minibatch_size: int = 32  # responses (control: environment steps) per optimizer step
    learning_rate: float = 1e-4  # learning rate of the actor
    critic_learning_rate: float = 3e-4  # learning rate of critics and Q-networks
    schedule: str = "linear"  # schedule of the learning rates: linear (decays to zero) or constant
    max_grad_norm: float = 1.0  # gradient clipping: maximum norm of each network's gradient
    checkpoint_every: int = 10  # iterations between checkpoints; the last iteration always saves one
    rank_timeout: int = 1800  # under torchrun: seconds that a process waits for the others before it gives up

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("learning_rate",),
            lambda job: "actor" not in job.trained,
            "the algorithm trains no actor, and its networks learn at critic_learning_rate; set that.",
        ),
        Unread(
            ("critic_learning_rate",),
            lambda job: job.trained == {"actor"},
            "the algorithm trains no critic and no Q-network; leave it out.",
        ),
        Unread(
            ("render_mode",),  # of env_arg
            lambda job: job.on_text or job.train.env_arguments()["render_mode"] != "human",
            "training shows nothing; watch the policy with `python -m agents play --run ...`.",
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("iterations", "minibatch_size", "checkpoint_every", "rank_timeout"))
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        check_choice(self, "schedule", SCHEDULES)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 or more and below 2^32, got {self.seed}.")
        if self.resume and self.run is None:
            raise ValueError("resume needs the folder of the run to continue; pass it as --run.")
        self.env_arguments()

    def env_arguments(self, texts: Collection[str] = ()) -> dict[str, Any]:
        """`env_arg` as keyword arguments of gym.make: JSON, Python numbers and words, or plain strings.

        texts: arguments that are never numbers or truth values, such as the name of a folder.
        """
        arguments = {}
        for item in self.env_arg:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--env-arg takes NAME=VALUE, got {item!r}; for instance kl_coef=0.05.")
            parsed = _value(value)
            arguments[name] = value if name in texts and isinstance(parsed, bool | int | float) else parsed
        return arguments


def id_of(env: str) -> str:
    """The id without the module that registers it: `module:Name-v0` is Name-v0, as in gym.make."""
    return env.rpartition(":")[2]


def check_counts(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError if a named field is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def check_choice(config: Any, name: str, values: Sequence[str]) -> None:
    """Raise ValueError if a named field is not one of `values`."""
    if getattr(config, name) not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(config, name)!r}.")


def check_shares(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError if a named field is outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(config, name)}.")


def check_not_negative(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError if a named field is below 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}.")


def _value(text: str) -> Any:
    """Parse JSON, or a Python number, True, False or None (.05 is not JSON); anything else stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # everything that literal_eval documents
        return text
    # An underscore is more likely part of a name, as in reference=2024_01, than a digit separator.
    return value if isinstance(value, int | float | None) and "_" not in text else text
