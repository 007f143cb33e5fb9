"""Settings of learning on environments other than text that all algorithms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agents.config import check_choice, check_counts, check_shares
from textenv.settings import check_types
from textenv.unread import Unread

ACTIVATIONS = ("tanh", "relu")
DISTRIBUTIONS = ("gaussian", "tanh")
LOWEST_LOG_STD, HIGHEST_LOG_STD = -20.0, 2.0
MODES = ("auto", "sync", "async")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Parallel environments, networks, normalization and evaluation."""

    num_envs: int = 8  # number of parallel environments
    steps: int = 128  # steps per environment in a rollout
    vectorization: str = "auto"  # auto (the environment's own vector version, else sync), sync or async
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers of every network
    activation: str = "tanh"  # activation of the hidden layers: tanh or relu
    distribution: str = "gaussian"  # continuous actions: gaussian (clipped to bounds) or tanh (squashed into bounds)
    initial_log_std: float = 0.0  # continuous actions: initial log std before tanh; learned, state-independent
    normalize_observation: bool = False  # normalize observations by their running mean and standard deviation
    normalize_reward: bool = False  # divide rewards by the running standard deviation of discounted returns
    reward_gamma: float = 0.99  # discount of the returns for normalize_reward
    evaluation_episodes: int = 20  # deterministic episodes before and after training

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("distribution", "initial_log_std"),
            lambda job: job.factory.discrete,
            "it is for continuous actions, and the environment's are discrete; leave it out.",
        ),
        Unread(
            ("reward_gamma",),
            lambda job: not job.settings.normalize_reward,
            "it is the discount of the returns by which rewards are normalized; set normalize_reward, or leave it out. "
            "The learner's discount is gamma.",
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("num_envs", "steps", "evaluation_episodes"))
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "distribution", DISTRIBUTIONS)
        check_choice(self, "vectorization", MODES)
        check_shares(self, ("reward_gamma",))
        if not LOWEST_LOG_STD <= self.initial_log_std <= HIGHEST_LOG_STD:
            raise ValueError(
                f"initial_log_std must lie in [{LOWEST_LOG_STD}, {HIGHEST_LOG_STD}], the bounds of the learned value, "
                f"got {self.initial_log_std}."
            )
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}.")
