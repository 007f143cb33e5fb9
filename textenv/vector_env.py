"""TextGen-v0 as a gymnasium.vector.VectorEnv: n episodes, one batched call per model and step.

The decision process itself is in dynamics.py. `reset(seed=s)` seeds row i with s + i; its episodes then equal those of
a single environment seeded with s + i.
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
from textenv.env import as_rows, as_tokens, make_spaces, observe, step_info
from textenv.prompts.reset_options import Choice, choose_prompts, rows_to_reset
from textenv.rendering.viewers import FPS, check_render_mode, make_viewer
from textenv.state import TextState, own_settings
from textenv.task import build_task

Arrays = dict[str, NDArray]


class TextGenVectorEnv(VectorEnv):
    """`num_envs` rows of TextGen-v0. It takes all arguments of `TextGenEnv`, and these.

    ## Arguments
    * `num_envs=1`: parallel episodes.
    * `autoreset_mode="NextStep"`: when a row restarts after its end; also `"SameStep"` or `"Disabled"`, in any spelling
      (`"same_step"`), or the enum.
    * `max_episode_steps=None`: steps after which an episode is truncated without a score, as by Gymnasium's `TimeLimit`
      in single environments; None or -1 is no limit.
    * `render_mode=None`: `"ansi"` or `"rgb_array"`; `render` returns a tuple with one text or image per row.

    The arguments `vector_kwargs` and `wrappers` of `make_vec` belong to its modes "sync" and "async"; to wrap this
    environment, use `gymnasium.wrappers.vector`. On CUDA the processes of "async" must not be forked: pass
    `vector_kwargs={"context": "spawn"}`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium declares it so; each instance gets a copy
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": FPS,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"], "; to watch one row live, use gym.make")
        self.num_envs = num_envs = as_rows("num_envs", num_envs)
        self.render_mode = render_mode
        self.max_episode_steps = _step_limit(max_episode_steps)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.task = build_task(read_settings(settings))
        self.dynamics = TextDynamics(self.task, num_envs)
        self.single_observation_space, self.single_action_space = make_spaces(self.task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [np_random()[0] for _ in range(num_envs)]
        self._ended = np.zeros(num_envs, dtype=bool)
        self.viewer = make_viewer(render_mode, self.task, num_envs)

    @own_settings()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Start new episodes in all rows, or in those of `options["reset_mask"]` (bool array [num_envs])."""
        rows = rows_to_reset(options, self.num_envs)
        chosen = choose_prompts(options, self.task.prompts, self.task.read_prompts, rows, self.num_envs)
        seeds = _seeds(seed, self.num_envs)
        seeded = {row: np_random(seeds[row])[0] for row in rows if seeds[row] is not None}  # check all before using any
        for row, generator in seeded.items():
            self._generators[row] = generator
            self.dynamics.seed(row)
        observation = observe(self._restart(rows, chosen))
        return observation, self._started(rows, {}) | self._mask_info(rows)

    @own_settings()
    def step(self, actions: Any) -> tuple[Arrays, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Append one token to every row; rows whose episode has ended restart as `autoreset_mode` says."""
        tokens = torch.from_numpy(as_tokens(actions, self.num_envs)).to(self.task.device)
        restarting = self._restarting()
        active = torch.from_numpy(~restarting).to(self.task.device)
        transition = self.dynamics.step(tokens, active)
        if self.viewer is not None:
            self.viewer.record(transition, active)
        rewards = transition.reward.double().cpu().numpy()
        terminations = transition.terminated.cpu().numpy().copy()
        truncations = ~restarting & (transition.state.generated_length.cpu().numpy() >= self.max_episode_steps)
        ended = terminations | truncations
        infos = self._infos(transition, ~restarting, ended)
        starting = ended if self.autoreset_mode is AutoresetMode.SAME_STEP else restarting
        self._ended = ended
        state, rows = transition.state, np.flatnonzero(starting).tolist()
        if rows:
            state = self._restart(rows, None)
            infos = self._started(rows, infos)
        infos |= self._mask_info(range(self.num_envs))
        return observe(state), rewards, terminations, truncations, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Which tokens may come next in each row, bool [n, V]: all of them without `action_mask`."""
        return self.dynamics.action_mask().cpu().numpy().copy()

    @own_settings()
    def render(self) -> tuple[Any, ...] | None:
        """The episodes so far, one text (`ansi`) or image (`rgb_array`) per row."""
        return None if self.viewer is None else self.viewer.frames()

    def _restarting(self) -> NDArray[np.bool_]:
        """The rows that restart at this step and ignore their token, bool [n]."""
        if self.autoreset_mode is AutoresetMode.DISABLED and self._ended.any():
            raise ValueError(
                f"the episode in row {int(self._ended.argmax())} is over; with autoreset_mode='Disabled' call "
                "reset(options={'reset_mask': terminated | truncated}) first."
            )
        return self._ended if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros_like(self._ended)

    def _restart(self, rows: list[int], chosen: Choice | None) -> TextState:
        self._ended = self._ended.copy()
        self._ended[rows] = False
        if chosen is not None:
            state = self.dynamics.begin(rows, *chosen)
        else:
            state = self.dynamics.reset(rows, [self.dynamics.draw(row, self._generators[row]) for row in rows])
        if self.viewer is not None:
            self.viewer.restart(rows, state)
        return state

    def _started(self, rows: list[int], infos: dict[str, Any]) -> dict[str, Any]:
        """The infos, with the reset information of these rows added."""
        for row in rows:
            infos = self._add_info(infos, {"prompt_index": self.dynamics.prompt_index[row]}, row)
        return infos

    def _mask_info(self, rows: Iterable[int]) -> dict[str, Any]:
        if not self.task.masks:
            return {}
        reported = np.isin(np.arange(self.num_envs), list(rows))
        masks = np.where(reported[:, None], self.action_masks(), 0).astype(np.int8)
        return {"action_mask": masks, "_action_mask": reported}

    def _infos(self, transition: Transition, stepped: NDArray, ended: NDArray) -> dict[str, Any]:
        """Infos as Gymnasium's vector environments lay them out: per key an array, and a mask of rows that set it."""
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        reported = stepped & ~ended if same_step else stepped
        infos: dict[str, Any] = {}
        if self.task.reference is not None and reported.any():
            values = transition.reference_log_prob.double().cpu().numpy()
            infos = {"reference_log_prob": np.where(reported, values, 0.0), "_reference_log_prob": reported.copy()}
        rows = np.flatnonzero(ended).tolist() if same_step else list(transition.responses)
        masks = self.action_masks().astype(np.int8) if same_step and rows and self.task.masks else None
        for row in rows:
            info = step_info(self.task, transition, row)
            if same_step:
                if masks is not None:
                    info["action_mask"] = masks[row].copy()
                info = {"final_obs": observe(transition.state, row), "final_info": info}
            infos = self._add_info(infos, info, row)
        return infos


def row_info(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a vector environment's infos, as a single environment would return it.

    For every `key` Gymnasium has a mask `_key` of the rows that set it. Final observations and infos are left out.
    """
    info: dict[str, Any] = {}
    for key, values in infos.items():
        is_set = infos.get(f"_{key}")
        if key in ("final_obs", "final_info") or is_set is None or not is_set[row]:
            continue
        if isinstance(values, dict):
            info[key] = row_info(values, row)
        else:
            value = values[row]
            info[key] = value.item() if isinstance(value, np.generic) else value
    return info


def _step_limit(limit: int | None) -> float:
    """Validate `max_episode_steps`; None and -1, Gymnasium's code for no limit, give infinity."""
    if limit is None or limit == -1:
        return math.inf
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"max_episode_steps must be a whole number of at least 1, or None for no limit, got {limit!r}."
        )
    return limit


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    modes = {known.value.lower(): known for known in AutoresetMode}
    spelling = mode.replace("_", "").lower() if isinstance(mode, str) else None  # same_step, SAME_STEP and SameStep
    if spelling not in modes:
        raise ValueError(f"autoreset_mode must be one of {[known.value for known in AutoresetMode]}, got {mode!r}.")
    return modes[spelling]


def _seeds(seed: int | Sequence[int | None] | None, rows: int) -> list[int | None]:
    if seed is None:
        return [None] * rows
    if isinstance(seed, int | np.integer):
        return [int(seed) + row for row in range(rows)]
    if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str) or len(seed) != rows:
        raise ValueError(f"seed must be one whole number or a list of {rows} (num_envs), got {seed!r}.")
    return [int(each) if isinstance(each, np.integer) else each for each in seed]
