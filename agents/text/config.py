"""The settings of learning on text, whatever the algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from agents.config import check_choice, check_counts
from textenv.kl import ESTIMATORS, EXACT, UNITS

CRITICS = ("auto", "reward-model", "reference", "scratch")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How responses are sampled, penalized and measured."""

    rollout_size: int = 128  # responses in a rollout
    micro_batch_size: int = 16  # responses that a forward pass reads at a time; changes speed and memory, not gradients
    mask_refresh: int = 20  # iterations between refreshes of a mask policy (NLPO) by the actor; 0 is never
    critic: str = "auto"  # starts from: reward-model (auto: where it reads the same tokens), reference, scratch
    kl_estimator: str = "k1"  # of the penalty in the reward: k1, k2, k3 or exact; k1 alone has the KL's gradient
    kl_controller: str = "fixed"  # fixed, or adaptive: β begins as kl_coef and moves towards kl_target
    kl_target: float | None = None  # nats per kl_unit that an adaptive β keeps to
    kl_horizon: int = 1_280  # responses after which a KL 20% off its target has moved β by about 20%
    kl_unit: str = "response"  # what kl_target is counted per: response or token
    evaluation_prompts: int = 256  # held-out prompts measured before and after
    # Where they come from, .jsonl or module:function; default the embedded task's, or a part of the prompts.
    held_out: str | None = None
    # module:function(prompts, responses) that is measured and never optimized; default the embedded task's.
    gold: str | None = None

    def __post_init__(self) -> None:
        self._check_kl()
        check_counts(self, ("rollout_size", "micro_batch_size", "evaluation_prompts", "kl_horizon"))
        check_choice(self, "critic", CRITICS)
        if self.mask_refresh < 0:
            raise ValueError(f"mask_refresh must be 0 (never) or more, got {self.mask_refresh}.")

    def _check_kl(self) -> None:
        check_choice(self, "kl_estimator", (*ESTIMATORS, EXACT))
        check_choice(self, "kl_controller", ("fixed", "adaptive"))
        check_choice(self, "kl_unit", UNITS)
        if self.kl_controller == "fixed" and self.kl_target is not None:
            raise ValueError(
                f"kl_target={self.kl_target} needs a β that moves; set kl_controller to adaptive, or leave it out."
            )
        if self.kl_controller == "adaptive" and not (self.kl_target is not None and 0 < self.kl_target < math.inf):
            raise ValueError(
                f"an adaptive kl_controller needs a kl_target above 0, in nats per {self.kl_unit} (kl_unit), got "
                f"{self.kl_target}; 6 nats a response is usual."
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How a trained policy answers a prompt of a person's own."""

    prompt: str  # the text to go on from
    samples: int = 3  # how many responses
    temperature: float | None = None  # of the sampling; default the run's own
    top_k: int = 0  # sample among the k likeliest tokens; 0 is all, 1 is greedy
    top_p: float = 1.0  # sample among the likeliest tokens that together reach this probability
    seed: int = 0  # of the sampling
    color: Literal["none", "penalty", "advantage"] = "none"  # each token's, for the run's own sampling

    def __post_init__(self) -> None:
        check_counts(self, ("samples",))
        if self.color != "none" and (self.temperature, self.top_k, self.top_p) != (None, 0, 1.0):
            raise ValueError(
                "--color shows the policy as it was trained; leave out --temperature, --top-k and --top-p."
            )
