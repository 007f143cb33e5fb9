"""Settings of a training run that all algorithms and environments share, and checks for all settings."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from textenv.settings import check_types
from textenv.unread import Unread

BEST = "best"  # of keep_checkpoints
SCHEDULES = ("linear", "constant")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
NO_TRACKER = "none"
DUMP_FORMATS = ("jsonl", "parquet")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Environment, algorithm, run length, optimizer and run folder."""

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
    # where metrics, samples, pictures and settings go beside the run folder: tensorboard, trackio, wandb or mlflow; may
    # be repeated, and replaces the default; none: nowhere
    tracker: tuple[str, ...] = ("tensorboard",)
    # iterations between rollouts that are written whole, token by token, to RUN/rollouts, which
    # agents.reporting.dumps.read_rollouts reads; 0: never
    dump_rollouts: int = 0
    dump_format: str = "jsonl"  # format of these files: jsonl or parquet
    # how many checkpoints to keep, or best: the last one and the best on held-out prompts (by score − β·KL; on control
    # by return), which are then evaluated at every checkpoint. With best, or 2 and more, they are
    # checkpoint-ITERATION.pt, and a copy of one as checkpoint.pt takes the run back to it
    keep_checkpoints: int | Literal["best"] = 1
    rank_timeout: int = 1800  # under torchrun: seconds that a process waits for the others before it gives up

    # Algorithms, text (`TextConfig`) and other environments (`ControlConfig`) have their own settings. The `UNREAD` of
    # all these classes are cases of an `agents.unread.Job` in which a setting would do nothing.
    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("dump_format",),
            lambda job: job.train.dump_rollouts == 0,
            "no rollout is written; give --dump-rollouts 10 or so, or leave it out.",
        ),
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
        if self.keep_checkpoints != BEST:
            check_counts(self, ("keep_checkpoints",))
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "dump_format", DUMP_FORMATS)
        check_not_negative(self, ("dump_rollouts",))
        self._check_trackers()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 or more and below 2^32, got {self.seed}.")
        if self.resume and self.run is None:
            raise ValueError("resume needs the folder of the run to continue; pass it as --run.")
        self.env_arguments()

    def _check_trackers(self) -> None:
        names = (*TRACKERS, NO_TRACKER)
        if not set(self.tracker) <= set(names) or len(set(self.tracker)) < len(self.tracker):
            raise ValueError(
                f"tracker takes different names out of {', '.join(names)}, got {', '.join(self.tracker)!r}."
            )
        if NO_TRACKER in self.tracker and len(self.tracker) > 1:
            others = " and ".join(name for name in self.tracker if name != NO_TRACKER)
            raise ValueError(f"--tracker {NO_TRACKER} excludes all others, and {others} was given too; leave one out.")

    def env_arguments(self, texts: Collection[str] = ()) -> dict[str, Any]:
        """`env_arg` as keyword arguments of gym.make: JSON, Python numbers and words, or plain strings.

        texts: arguments that are never numbers or truth values, such as the name of a folder.
        """
        arguments = {}
        for item in self.env_arg:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--env-arg takes NAME=VALUE, got {item!r}; for instance kl_coef=0.05.")
            parsed = parsed_value(value)
            arguments[name] = value if name in texts and isinstance(parsed, bool | int | float) else parsed
        return arguments

    def with_env_arg(self, values: Mapping[str, str]) -> TrainConfig:
        """The settings with arguments of gym.make, as texts, in the place of any of the same names."""
        return replace(self, env_arg=with_items(self.env_arg, values))


def with_items(items: Sequence[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """NAME=VALUE items, and values in the place of any of the same names."""
    kept = [item for item in items if item.partition("=")[0] not in values]
    return (*kept, *(f"{name}={value}" for name, value in values.items()))


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


def parsed_value(text: str) -> Any:
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
