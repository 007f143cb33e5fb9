"""The settings of a training run that every algorithm shares, validated once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained on what, how long, and where it is written. An algorithm's own settings are its own."""

    env: str = "TextGen-v0"  # Gymnasium id of the environment
    env_arg: tuple[str, ...] = ()  # NAME=VALUE for gym.make, repeatable; VALUE is JSON or a plain string
    algorithm: str = "ppo"  # the learner's name
    seed: int = 0  # of everything random in the run
    run: str | None = None  # folder to write; default runs/ENV-ALGORITHM-seedN-DATE
    resume: bool = False  # go on with the run in that folder
    iterations: int = 30  # rollouts, each followed by its updates
    rollout: int = 128  # responses in a rollout
    minibatch: int = 32  # responses in an optimiser step
    micro_batch: int = 16  # responses that a forward pass reads at a time; changes speed and memory, not gradients
    learning_rate: float = 1e-4  # of the actor, falling linearly to zero
    critic_learning_rate: float = 3e-4  # of the critic, likewise
    max_grad_norm: float = 1.0  # of each network's gradient; larger ones are scaled down
    mask_refresh: int = 20  # iterations between refreshes of a mask policy (NLPO) by the actor; 0 is never
    evaluation_prompts: int = 256  # held-out prompts measured before and after
    held_out: str | None = (
        None  # their source (.jsonl or module:function); default the embedded task's, or a part of prompts
    )
    gold: str | None = (
        None  # module:function(prompts, responses) measured, never optimised; default the embedded task's
    )
    checkpoint_every: int = 10  # iterations between checkpoints; the last one is always kept

    def __post_init__(self) -> None:
        for name in (
            "iterations",
            "rollout",
            "minibatch",
            "micro_batch",
            "evaluation_prompts",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.mask_refresh < 0:
            raise ValueError(f"mask_refresh must be 0 (never) or more, got {self.mask_refresh}.")
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.rollout % self.minibatch:
            raise ValueError(
                f"minibatch must divide rollout, so that every optimiser step sees as many responses; got rollout="
                f"{self.rollout} and minibatch={self.minibatch}."
            )
        self.env_arguments()

    def env_arguments(self) -> dict[str, Any]:
        """`env_arg` as keyword arguments of gym.make."""
        arguments = {}
        for item in self.env_arg:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--env-arg takes NAME=VALUE, got {item!r}; for instance kl_coef=0.05.")
            arguments[name] = _value(value)
        return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
