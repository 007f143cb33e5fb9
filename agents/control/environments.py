"""Parallel Gymnasium environments with flat observations, recorded returns and optional normalization."""

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
from agents.control.networks import check_observation_space

CLIP = 10.0  # bound of normalized observations and rewards, as in Stable-Baselines3


@dataclass(frozen=True)
class Episode:
    """A finished episode."""

    row: int  # its environment
    total: float  # undiscounted return
    length: int


class Returns(VectorWrapper):
    """Records returns and lengths of finished episodes, before any normalization."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.clear()

    def clear(self) -> None:
        """Discard all steps so far. Called with every reset of all environments."""
        self.steps: list[tuple[Any, Any]] = []  # (reward, ended), [B] each, since the last `take`
        self.total = np.zeros(self.num_envs)  # of unfinished episodes
        self.length = np.zeros(self.num_envs, dtype=np.int64)
        self.resetting = np.zeros(self.num_envs, dtype=bool)  # rows whose next step only resets them (NEXT_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every environment. Episodes are worked out later, in `take`."""
        result = self.env.step(actions)
        self.steps.append((result[1].copy(), result[2] | result[3]))
        return result

    def take(self) -> list[Episode]:
        """Episodes that finished since the last call, ordered by their last step."""
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


class Raw(VectorWrapper):
    """Keeps the latest observations and rewards, for the normalizers around it change them."""

    observation: np.ndarray  # [B, D]
    reward: np.ndarray  # [B]

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Reset all environments."""
        self.observation, info = self.env.reset(**arguments)
        return self.observation, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every environment."""
        result = self.env.step(actions)
        self.observation, self.reward = result[:2]
        return result


class NormalizeReward(VectorWrapper):
    """Divides rewards by the running standard deviation of discounted returns and clips them to ±`CLIP`.

    Gymnasium 1.4's wrapper of the same name carries a return past time limits into the next episode and drops it one
    step before an episode ends, so its scale drifts (on MountainCar by half within 20 episodes).
    """

    def __init__(self, env: VectorEnv, gamma: float) -> None:
        super().__init__(env)
        self.gamma, self.return_rms = gamma, RunningMeanStd()
        self.clear()

    def clear(self) -> None:
        """Discard unfinished episodes; keep the statistics. Called with every reset of all environments."""
        self.discounted = np.zeros(self.num_envs)  # return so far; the latest reward is not discounted
        self.resetting = np.zeros(self.num_envs, dtype=bool)  # rows whose next step only resets them (NEXT_STEP)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every environment."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        self.discounted = self.gamma * self.discounted + reward
        if not self.resetting.all():
            self.return_rms.update(self.discounted[~self.resetting])
        self.resetting = terminated | truncated
        self.discounted[self.resetting] = 0.0
        return observation, self.scaled(reward), terminated, truncated, info

    def scaled(self, reward: np.ndarray) -> np.ndarray:
        """Rewards divided by the present deviation of returns and clipped."""
        return np.clip(reward / np.sqrt(self.return_rms.var + 1e-8), -CLIP, CLIP)


class Environments:
    """A vector environment and its normalizers. Their running statistics are part of checkpoints."""

    def __init__(self, config: TrainConfig, settings: ControlConfig, num_envs: int) -> None:
        self.limit = episode_limit(config)
        self.returns = Returns(make_vector(config, settings, num_envs))
        self.raw = Raw(self.returns)
        self.env: VectorEnv = self.raw
        self.observations = self.rewards = None
        if settings.normalize_observation:
            self.env = self.observations = wrappers.NormalizeObservation(self.env)
            self.env = wrappers.TransformObservation(self.env, clip_observation)
        if settings.normalize_reward:
            self.env = self.rewards = NormalizeReward(self.env, settings.reward_gamma)

    def normalized_observations(self, raw: np.ndarray) -> np.ndarray:
        """Observations [..., D] normalized by the present statistics, which do not change."""
        if self.observations is None:
            return raw
        statistics = self.observations.obs_rms
        scaled = (raw - statistics.mean) / np.sqrt(statistics.var + self.observations.epsilon)
        return clip_observation(scaled.astype(np.float32))

    def normalized_rewards(self, raw: np.ndarray) -> np.ndarray:
        """Rewards [...] normalized by the present statistics, which do not change."""
        return raw if self.rewards is None else self.rewards.scaled(raw)

    def reset(self, seed: int) -> np.ndarray:
        """Reset all environments; returns their observations [B, D]."""
        self.returns.clear()
        if self.rewards is not None:
            self.rewards.clear()
        return self.env.reset(seed=seed)[0]

    def share_statistics(self, other: Environments) -> None:
        """Normalize observations by the statistics of `other` without updating them."""
        if self.observations is not None and other.observations is not None:
            self.observations.obs_rms = other.observations.obs_rms
            self.observations.update_running_mean = False

    def observation_statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and variance of the observations so far, [D] each; None if they are not normalized."""
        if self.observations is None:
            return None
        return self.observations.obs_rms.mean, self.observations.obs_rms.var

    def state_dict(self) -> dict[str, Any]:
        """Running statistics as lists of numbers."""
        return {name: {key: _to_list(value) for key, value in vars(rms).items()} for name, rms in self._statistics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        for name, rms in self._statistics():
            for key, value in state[name].items():
                old = getattr(rms, key)
                setattr(rms, key, np.asarray(value, dtype=old.dtype) if isinstance(old, np.ndarray) else value)

    def _statistics(self) -> list[tuple[str, Any]]:
        statistics = []
        if self.observations is not None:
            statistics.append(("observation", self.observations.obs_rms))
        if self.rewards is not None:
            statistics.append(("return", self.rewards.return_rms))
        return statistics


def episode_limit(config: TrainConfig) -> int | None:
    """Steps after which an episode is truncated; None: never, which gym.make spells -1."""
    limit = config.env_arguments().get("max_episode_steps", gym.spec(id_of(config.env)).max_episode_steps)
    return limit if limit is not None and limit > 0 else None


def clip_observation(observation: np.ndarray) -> np.ndarray:
    """Clip normalized observations: with early statistics, small differences become very large."""
    return np.clip(observation, -CLIP, CLIP)


def make_vector(config: TrainConfig, settings: ControlConfig, num_envs: int) -> VectorEnv:
    """Parallel environments with flat observations. Each resets in the step after an episode ends (NEXT_STEP).

    So the observation that a step returns is always the true successor of the previous one. The step after an episode's
    last one belongs to no episode, and the rollout's mask leaves it out.

    Raises ValueError for environments that cannot be made, reset in another way, or have observations that the networks
    do not take.
    """
    mode = None if settings.vectorization == "auto" else settings.vectorization
    try:
        env = gym.make_vec(config.env, num_envs=num_envs, vectorization_mode=mode, **config.env_arguments())
    except (gym.error.Error, TypeError, ValueError, ImportError, LookupError) as error:
        raise ValueError(f"gym.make_vec cannot make {config.env!r}: {error}") from error
    if env.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"{config.env!r} has the vector environment {type(env.unwrapped).__name__}, which does not reset in the "
            "step after an episode ends (autoreset_mode NextStep); leave autoreset_mode out of its arguments, or set "
            "vectorization to sync."
        )
    space = env.single_observation_space
    check_observation_space(config.env, space)
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return env
    return wrappers.FlattenObservation(env)


def _to_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
