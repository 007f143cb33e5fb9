"""TextGen-v0 as a gymnasium.vector.VectorEnv: n episodes, one batched call per model and step.

A face of dynamics.py. Row i seeded with s + i gives the episodes that a single environment seeded so gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from textenv.config import read_settings
from textenv.dynamics import TextDynamics, Transition
from textenv.env import as_tokens, make_spaces, observe, step_info
from textenv.options import Choice, choose_prompts, rows_to_reset
from textenv.render import ansi
from textenv.state import TextState
from textenv.task import build_task

Arrays = dict[str, NDArray]


class TextGenVectorEnv(VectorEnv):
    """`num_envs` rows of TextGen-v0. Arguments as in `TextGenEnv`, and those of vector environments.

    `autoreset_mode`: a name or the enum. `max_episode_steps`: steps after which an unfinished episode is truncated,
    as Gymnasium's `TimeLimit` does it for single environments; `make_vec` passes it on. `make_vec`'s `vector_kwargs`
    and `wrappers` are for its modes "sync" and "async"; wrap this environment itself with `gymnasium.wrappers.vector`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own form; each instance has its copy
        "render_modes": ["ansi"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **settings: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}.")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = _mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.task = build_task(read_settings(settings))
        self.dynamics = TextDynamics(self.task, num_envs)
        self.single_observation_space, self.single_action_space = make_spaces(self.task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [np_random()[0] for _ in range(num_envs)]
        self._ended = np.zeros(num_envs, dtype=bool)
        self._limit = _limit(max_episode_steps)
        self._steps = np.zeros(num_envs, dtype=np.int64)  # of the running episodes

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Starts new episodes in all rows, or in those of `options["reset_mask"]` (bool array)."""
        rows = rows_to_reset(options, self.num_envs)
        chosen = choose_prompts(options, self.task, rows, self.num_envs)
        for row, row_seed in zip(range(self.num_envs), _seeds(seed, self.num_envs), strict=True):
            if row_seed is not None and row in rows:
                self._generators[row] = np_random(row_seed)[0]
                self.dynamics.seed(row)
        observation = self._observe(self._restart(rows, chosen))
        return observation, self._started(rows, {}) | self._mask_info(rows)

    def step(self, actions: Any) -> tuple[Arrays, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Writes one token a row. A row that ended before starts anew instead, as `autoreset_mode` says."""
        tokens = torch.from_numpy(as_tokens(actions, self.num_envs)).to(self.task.device)
        next_step = self.autoreset_mode is AutoresetMode.NEXT_STEP
        resting = self._ended if next_step else np.zeros_like(self._ended)  # rows that take no token now
        transition = self.dynamics.step(tokens, torch.from_numpy(~resting).to(self.task.device))
        rewards = transition.reward.double().cpu().numpy()
        terminations = transition.terminated.cpu().numpy().copy()
        self._steps += ~resting
        truncations = ~resting & (self._steps >= self._limit)
        self._ended = terminations | truncations
        infos = self._infos(transition, ~resting)
        starting = self._ended if self.autoreset_mode is AutoresetMode.SAME_STEP else resting
        state, rows = transition.state, np.flatnonzero(starting).tolist()
        if rows:
            state = self._restart(rows, None)
            infos = self._started(rows, infos)
        infos |= self._mask_info(range(self.num_envs))
        if truncations.any():  # last, since infos show such rows as they were when the limit fell
            self.dynamics.cut(np.flatnonzero(truncations & self._ended).tolist())
        return self._observe(state), rewards, terminations, truncations, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Which tokens may come next in each row, bool [n, V]. All of them without `action_mask`."""
        return self.dynamics.action_mask().cpu().numpy().copy()

    def render(self) -> tuple[str, ...] | None:
        """The texts so far, as `render_mode="ansi"` asks."""
        if self.render_mode != "ansi":
            return None
        state, tokenizer = self.dynamics.state, self.task.tokenizer
        return tuple(ansi(state, row, tokenizer) for row in range(self.num_envs))

    def _restart(self, rows: list[int], chosen: Choice | None) -> TextState:
        self._ended = self._ended.copy()
        self._ended[rows], self._steps[rows] = False, 0
        if chosen is not None:
            return self.dynamics.begin(rows, *chosen)
        return self.dynamics.reset(rows, [self.dynamics.draw(row, self._generators[row]) for row in rows])

    def _started(self, rows: list[int], infos: dict[str, Any]) -> dict[str, Any]:
        """The infos, and what a reset says of these rows."""
        for row in rows:
            infos = self._add_info(infos, {"prompt_index": self.dynamics.prompt_index[row]}, row)
        return infos

    def _mask_info(self, rows: Iterable[int]) -> dict[str, Any]:
        if not self.task.masks:
            return {}
        shown = np.isin(np.arange(self.num_envs), list(rows))
        return {"action_mask": np.where(shown[:, None], self.action_masks(), 0).astype(np.int8), "_action_mask": shown}

    def _observe(self, state: TextState) -> Arrays:
        return {
            "input_ids": state.input_ids.cpu().numpy().copy(),
            "attention_mask": state.attention_mask.cpu().numpy().astype(np.int8),
        }

    def _infos(self, transition: Transition, stepped: NDArray) -> dict[str, Any]:
        """Arrays, and masks of the rows that they speak for, laid out as Gymnasium's own vector environments do."""
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        shown = stepped & ~self._ended if same_step else stepped
        infos: dict[str, Any] = {}
        if self.task.reference is not None and shown.any():
            values = transition.reference_log_prob.double().cpu().numpy()
            infos = {"reference_log_prob": np.where(shown, values, 0.0), "_reference_log_prob": shown.copy()}
        rows = np.flatnonzero(self._ended).tolist() if same_step else list(transition.responses)
        masks = self.action_masks().astype(np.int8) if same_step and rows and self.task.masks else None
        for row in rows:
            info = step_info(self.task, transition, row)
            if same_step:
                if masks is not None:
                    info["action_mask"] = masks[row].copy()
                info = {"final_obs": observe(transition.state, row), "final_info": info}
            infos = self._add_info(infos, info, row)
        return infos


def _limit(max_episode_steps: int | None) -> float:
    """The limit as a number; -1 is none, as Gymnasium has it."""
    if max_episode_steps in (None, -1):
        return math.inf
    if isinstance(max_episode_steps, bool) or not isinstance(max_episode_steps, int) or max_episode_steps < 1:
        raise ValueError(
            f"max_episode_steps must be a whole number of at least 1, or None for no limit, got {max_episode_steps!r}."
        )
    return max_episode_steps


def _mode(given: str | AutoresetMode) -> AutoresetMode:
    names = {mode.value: mode for mode in AutoresetMode} | {mode.name: mode for mode in AutoresetMode}
    if isinstance(given, AutoresetMode):
        return given
    if given not in names:
        raise ValueError(f"autoreset_mode must be one of {sorted(names)}, got {given!r}.")
    return names[given]


def _seeds(seed: int | Sequence[int | None] | None, rows: int) -> list[int | None]:
    if seed is None:
        return [None] * rows
    if isinstance(seed, int | np.integer):
        return [int(seed) + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed must be one number or {rows} of them (num_envs), got {len(seed)}.")
    return list(seed)
