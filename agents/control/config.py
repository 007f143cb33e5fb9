"""The settings of learning on environments other than text, whatever the algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from agents.config import check_choice, check_counts, check_shares

ACTIVATIONS = ("tanh", "relu")
DISTRIBUTIONS = ("gaussian", "tanh")
LOWEST_LOG_STD, HIGHEST_LOG_STD = -20.0, 2.0
MODES = ("auto", "sync", "async")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How an environment is played, and what reads its observations."""

    num_envs: int = 8  # environments played side by side
    steps: int = 128  # of each environment in a rollout
    vectorization: str = "auto"  # of the environments: auto is the environment's own where it has one, else sync
    hidden: tuple[int, ...] = (64, 64)  # widths of the layers of every network
    activation: str = "tanh"  # between them: tanh or relu
    distribution: str = "gaussian"  # of continuous actions: gaussian, clipped to bounds, or tanh, squashed into them
    initial_log_std: float = 0.0  # of continuous actions, before tanh; learned, the same in every state
    normalize_observation: bool = False  # to mean 0 and standard deviation 1 of all seen so far
    normalize_reward: bool = False  # by the standard deviation of the discounted returns seen so far
    reward_gamma: float = 0.99  # the discount of those returns
    evaluation_episodes: int = 20  # played without chance before and after

    def __post_init__(self) -> None:
        check_counts(self, ("num_envs", "steps", "evaluation_episodes"))
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "distribution", DISTRIBUTIONS)
        check_choice(self, "vectorization", MODES)
        check_shares(self, ("reward_gamma",))
        if not LOWEST_LOG_STD <= self.initial_log_std <= HIGHEST_LOG_STD:
            raise ValueError(
                f"initial_log_std must lie in [{LOWEST_LOG_STD}, {HIGHEST_LOG_STD}], the bounds of what is learned, "
                f"got {self.initial_log_std}."
            )
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, got {self.hidden}.")
