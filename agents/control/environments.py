"""Gymnasium environments side by side, as the collector plays them: flat observations, returns noted, normalized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers import vector as wrappers
from gymnasium.wrappers.utils import RunningMeanStd

from agents.config import TrainConfig, id_of
from agents.control.config import ControlConfig

CLIP = 10.0  # normalized observations and rewards are cut off here, as by Stable-Baselines3


@dataclass(frozen=True)
class Episode:
    """One that has finished."""

    row: int  # of the environment it was played in
    total: float  # its return, undiscounted
    length: int


class Returns(VectorWrapper):
    """Keeps the returns and lengths of finished episodes, as the environment pays them."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.begin()

    def begin(self) -> None:
        """Forgets all steps so far."""
        self.steps: list[tuple[Any, Any]] = []  # rewards and ends, [B] each, since they were last taken
        self.total = np.zeros(self.num_envs)  # of unfinished episodes
        self.length = np.zeros(self.num_envs, dtype=np.int64)
        self.resetting = np.zeros(self.num_envs, dtype=bool)  # rows whose next step only resets (NEXT_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every environment; what it means for episodes is worked out when they are taken."""
        found = self.env.step(actions)
        self.steps.append((found[1].copy(), found[2] | found[3]))
        return found

    def take(self) -> list[Episode]:
        """The episodes that finished since the last call, in the order of their ends."""
        if not self.steps:
            return []
        reward, ended = (np.stack(part) for part in zip(*self.steps, strict=True))  # [T, B] both
        counts = ~np.concatenate([self.resetting[None], ended[:-1]])
        total = self.total + np.cumsum(np.where(counts, reward, 0.0), 0, dtype=np.float64)
        length, finished = self.length + np.cumsum(counts, 0), []
        for step, row in np.argwhere(ended & counts):
            finished.append(Episode(int(row), float(total[step, row]), int(length[step, row])))
            total[step:, row] -= total[step, row]
            length[step:, row] -= length[step, row]
        self.total, self.length, self.resetting, self.steps = total[-1], length[-1], ended[-1], []
        return finished


class NormalizeReward(VectorWrapper):
    """Rewards over the running standard deviation of discounted returns, cut off at `CLIP`.

    Gymnasium 1.4's of the same name lets a return run on past time limits into the next episode, and forgets it one
    step before an end, so that its scale drifts (MountainCar's by half within 20 episodes).
    """

    def __init__(self, env: VectorEnv, gamma: float) -> None:
        super().__init__(env)
        self.gamma, self.return_rms = gamma, RunningMeanStd()
        self.begin()

    def begin(self) -> None:
        """Forgets unfinished episodes."""
        self.discounted = np.zeros(self.num_envs)  # return so far, the newest reward in full
        self.resetting = np.zeros(self.num_envs, dtype=bool)  # rows whose next step only resets (NEXT_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every environment."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        self.discounted = self.gamma * self.discounted + reward
        if not self.resetting.all():
            self.return_rms.update(self.discounted[~self.resetting])
        self.resetting = terminated | truncated
        self.discounted[self.resetting] = 0.0
        scaled = reward / np.sqrt(self.return_rms.var + 1e-8)
        return observation, np.clip(scaled, -CLIP, CLIP), terminated, truncated, info


class Environments:
    """A vector environment and its normalizers, whose statistics go into checkpoints."""

    def __init__(self, config: TrainConfig, settings: ControlConfig, num_envs: int) -> None:
        self.limit = episode_limit(config)
        self.returns = Returns(make_vector(config, settings, num_envs))
        self.env: VectorEnv = self.returns
        self.observations = self.rewards = None
        if settings.normalize_observation:
            self.env = self.observations = wrappers.NormalizeObservation(self.env)
            self.env = wrappers.TransformObservation(self.env, clipped)
        if settings.normalize_reward:
            self.env = self.rewards = NormalizeReward(self.env, settings.reward_gamma)

    def reset(self, seed: int) -> np.ndarray:
        """Begins every episode anew."""
        self.returns.begin()
        if self.rewards is not None:
            self.rewards.begin()
        return self.env.reset(seed=seed)[0]

    def follow(self, other: Environments) -> None:
        """Normalizes observations by another's statistics, and leaves them as they are."""
        if self.observations is not None and other.observations is not None:
            self.observations.obs_rms = other.observations.obs_rms
            self.observations.update_running_mean = False

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, as lists of numbers."""
        return {name: {key: _listed(value) for key, value in vars(rms).items()} for name, rms in self._statistics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name, rms in self._statistics():
            for key, value in state[name].items():
                old = getattr(rms, key)
                setattr(rms, key, np.asarray(value, dtype=old.dtype) if isinstance(old, np.ndarray) else value)

    def _statistics(self) -> list[tuple[str, Any]]:
        found = []
        if self.observations is not None:
            found.append(("observation", self.observations.obs_rms))
        if self.rewards is not None:
            found.append(("return", self.rewards.return_rms))
        return found


def episode_limit(config: TrainConfig) -> int | None:
    """The steps after which an episode is cut off; None: never, as -1 says to gym.make."""
    limit = config.env_arguments().get("max_episode_steps", gym.spec(id_of(config.env)).max_episode_steps)
    return limit if limit is not None and limit > 0 else None


def clipped(observation: np.ndarray) -> np.ndarray:
    """Normalized observations within the bound: early statistics make giants of small differences."""
    return np.clip(observation, -CLIP, CLIP)


def make_vector(config: TrainConfig, settings: ControlConfig, num_envs: int) -> VectorEnv:
    """Environments side by side with flat observations, each beginning anew in the step after its end (NEXT_STEP).

    So the observation that step t returns is always the true successor of the one before, and step t + 1 after an end
    is none of an episode's: the mask leaves it out.
    """
    mode = None if settings.vectorization == "auto" else settings.vectorization
    try:
        env = gym.make_vec(config.env, num_envs=num_envs, vectorization_mode=mode, **config.env_arguments())
    except (gym.error.Error, TypeError, ImportError, LookupError) as error:
        raise ValueError(f"gym.make_vec cannot make {config.env!r}: {error}") from error
    if env.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"{config.env!r} has the vector environment {type(env.unwrapped).__name__}, which does not begin anew in "
            "the step after an end (autoreset_mode NEXT_STEP); set vectorization to sync."
        )
    space = env.single_observation_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return env
    try:
        return wrappers.FlattenObservation(env)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"the observations of {config.env!r}, {space}, cannot be flattened: {error}") from error


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
