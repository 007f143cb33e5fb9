"""Plays plain Gymnasium environments with the policy of a finished run, and shows or records the episodes.

    env = gym.make("CartPole-v1")
    episodes = play("runs/cartpole", env, episodes=3)

    player = load_player("runs/cartpole", env)  # or step by step
    observation, info = env.reset(seed=0)
    action = player(observation, info)

On control the policy is deterministic, as in `evaluate`: it normalizes observations by the statistics of the run and
stays within the bounds. On text it samples at the run's temperature and within the environment's action masks.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
from gymnasium.wrappers import RecordVideo

from agents.config import TrainConfig, check_counts
from agents.control.experiment import LONGEST
from agents.control.policy import SIZES, ControlPlayer
from agents.domains import TEXT, arguments_of, domain_of
from agents.run_folder import load_config, located
from agents.text.experiment import available
from agents.text.policy import TextPlayer
from textenv.settings import check_new_folder, check_types


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """How many episodes, and where they are shown."""

    episodes: int = 3  # number of episodes
    seed: int = 0  # seed of the first episode; each further one has the next
    # folder for a video of each episode; without it, text is printed, and control shown in a window where there is one
    video: Path | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("episodes",))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2^63, got {self.seed}.")


class Player(Protocol):
    """A policy for an environment."""

    def __call__(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action after a reset or step that returned this observation and info."""
        ...


@dataclass(frozen=True)
class Episode:
    """A finished episode."""

    total: float  # undiscounted sum of the environment's rewards
    length: int  # steps


def load_player(run_folder: Path | str, env: gym.Env, seed: int = 0) -> Player:
    """The policy of a finished run, for an environment with the spaces that it was trained on.

    seed: of the sampling, on text. Raises ValueError if the run has not finished, or the environment does not fit.
    """
    folder = Path(run_folder) / "actor"
    if os.path.isfile(folder / SIZES):  # Path.is_file raises OSError for a name that is too long
        return ControlPlayer(folder, env)
    if os.path.isfile(folder / "config.json"):
        return TextPlayer(folder, env, seed)
    raise ValueError(
        f"there is no policy in {str(folder)!r}: a run writes it when it ends. Pass the folder of a finished run, or "
        f"finish this one: python -m agents train --run {run_folder} --resume."
    )


def play(run_folder: Path | str, env: gym.Env, episodes: int = 1, seed: int = 0) -> list[Episode]:
    """Play episodes with the policy of a finished run; the first is reset with `seed`, the next with `seed + 1`."""
    player = load_player(run_folder, env, seed)
    return [play_episode(env, player, seed + number) for number in range(episodes)]


def play_episode(env: gym.Env, player: Player, seed: int | None = None) -> Episode:
    """Play one episode. Raises ValueError if it does not end within `LONGEST` steps."""
    observation, info = env.reset(seed=seed)
    total = 0.0
    for length in range(1, LONGEST + 1):
        observation, reward, terminated, truncated, info = env.step(player(observation, info))
        total += float(reward)
        if terminated or truncated:
            return Episode(total, length)
    raise ValueError(f"the episode has not ended after {LONGEST:,} steps; make the environment with max_episode_steps.")


def show(run_folder: Path, config: PlayConfig) -> list[Episode]:
    """Play the environment of a finished run in a window, in the terminal or into videos, and print the returns."""
    if config.video is not None:
        check_new_folder(config.video, "--video")
    parts = load_config(run_folder)
    train, _ = located(run_folder, *parts[:2])
    if domain_of(train.env) is TEXT:
        train = available(train, run_folder)
    try:
        with closing(open_shown(train, config.video)) as env:
            player = load_player(run_folder, env, config.seed)
            episodes = []
            for seed in range(config.seed, config.seed + config.episodes):
                episodes.append(play_episode(env, player, seed))
                print(f"seed {seed}: return {episodes[-1].total:+.2f} in {episodes[-1].length} steps", flush=True)
    except gym.error.DependencyNotInstalled as error:
        raise ValueError(f"the episodes cannot be shown: {error}.") from error
    if config.video is not None:
        print(f"videos in {config.video}/")
    return episodes


def open_shown(train: TrainConfig, video: Path | None) -> gym.Env:
    """The environment of a run, with the render mode that suits the place, and recorded if `video` is a folder."""
    plain = _make(train, None)  # kept while the second is made, which shares its models
    wanted = "rgb_array" if video is not None else "human"
    modes = plain.metadata.get("render_modes") or []
    if video is None:
        if wanted not in modes or not (domain_of(train.env) is TEXT or _has_display()):
            print("there is no window for the episodes here; --video FOLDER records them.")
            return plain
        return _make(train, wanted)
    if wanted not in modes:
        raise ValueError(f"{train.env!r} draws no images (its render modes are {modes}), so --video cannot record it.")
    return RecordVideo(_make(train, wanted), str(video), episode_trigger=lambda _: True, name_prefix="play")


def _make(train: TrainConfig, render_mode: str | None) -> gym.Env:
    arguments = arguments_of(train)
    arguments.pop("render_mode", None)
    # Not every environment takes the argument.
    rendering: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        return gym.make(train.env, **arguments, **rendering)
    except gym.error.Error as error:
        raise ValueError(f"gym.make cannot make {train.env!r}: {error}") from error


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
