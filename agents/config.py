"""The settings of a training run that every algorithm shares, validated once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from textenv.kl import ESTIMATORS, EXACT, UNITS


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
    kl_estimator: str = "k1"  # of the penalty in the reward: k1, k2, k3 or exact; k1 alone has the KL's gradient
    kl_controller: str = "fixed"  # or adaptive: β starts at the environment's kl_coef and moves towards kl_target
    kl_target: float | None = None  # nats per kl_unit that an adaptive β keeps to
    kl_horizon: int = 10_000  # responses after which a KL 20% off its target has moved β by about 20%
    kl_unit: str = "response"  # what kl_target is counted per: response or token
    evaluation_prompts: int = 256  # held-out prompts measured before and after
    held_out: str | None = (
        None  # their source (.jsonl or module:function); default the embedded task's, or a part of prompts
    )
    gold: str | None = (
        None  # module:function(prompts, responses) measured, never optimised; default the embedded task's
    )
    checkpoint_every: int = 10  # iterations between checkpoints; the last one is always kept

    def __post_init__(self) -> None:
        self._check_kl()
        for name in (
            "iterations",
            "rollout",
            "minibatch",
            "micro_batch",
            "evaluation_prompts",
            "checkpoint_every",
            "kl_horizon",
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

    def _check_kl(self) -> None:
        known = {"kl_estimator": (*ESTIMATORS, EXACT), "kl_controller": ("fixed", "adaptive"), "kl_unit": UNITS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.kl_controller == "fixed" and self.kl_target is not None:
            raise ValueError(
                f"kl_target={self.kl_target} needs a β that moves; set kl_controller to adaptive, or leave it out."
            )
        if self.kl_controller == "adaptive" and not (self.kl_target is not None and 0 < self.kl_target < math.inf):
            raise ValueError(
                f"an adaptive kl_controller needs a kl_target above 0, in nats per {self.kl_unit} (kl_unit), got "
                f"{self.kl_target}; 6 nats a response is usual."
            )

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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How a trained policy answers a prompt of a person's own."""

    prompt: str  # the text to go on from
    samples: int = 3  # how many responses
    temperature: float | None = None  # of the sampling; default the run's own
    top_k: int = 0  # sample among the k likeliest tokens; 0 is all, 1 is greedy
    top_p: float = 1.0  # sample among the likeliest tokens that together reach this probability
    seed: int = 0  # of the sampling
    colour: Literal["none", "penalty", "advantage"] = "none"  # each token's, for the run's own sampling

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")
        if self.colour != "none" and (self.temperature, self.top_k, self.top_p) != (None, 0, 1.0):
            raise ValueError(
                "--colour shows the policy as it was trained; leave out --temperature, --top-k and --top-p."
            )
