"""Gymnasium's vector environments for Stable-Baselines3, which knows its own kind (`VecEnv`) only.

The only file of textenv that imports stable_baselines3 (`pip install textenv[sb3]`). It changes layout, not numbers:
what it gives is what SB3's `DummyVecEnv` of single environments gives, at the native environment's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from textenv.vector_env import row_info


class VecEnvAdapter(VecEnv):
    """A Gymnasium vector environment in autoreset mode SAME_STEP as an SB3 `VecEnv`.

    `VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=32, autoreset_mode="SameStep"))`; put SB3's `VecMonitor` round
    it to see episode returns in SB3's log. Methods that answer for all rows at once, as `action_masks` and `render`
    do, are split into rows by `env_method`; attributes are those of the one environment, the same for every row.
    """

    def __init__(self, env: VectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode") if isinstance(env, VectorEnv) else None
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "Stable-Baselines3 expects the first observation of the next episode in the step that ends one, so "
                f"this takes a vector environment whose autoreset_mode must be SAME_STEP, got {mode} of {env}; make "
                'it with gym.make_vec(..., autoreset_mode="SameStep").'
            )
        self.env = env
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Starts an episode in every row, with the seeds and options that were set for it."""
        options: dict[str, Any] = self._options[0]
        if any(given != options for given in self._options):
            raise ValueError(
                "this environment takes one set of reset options for all rows; call set_options with one dict, got "
                f"{self._options}."
            )
        seeds: Any = None if all(seed is None for seed in self._seeds) else self._seeds
        observation, infos = self.env.reset(seed=seeds, options=options or None)
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """One step of every row. A row that ended shows its next episode, and its end in `terminal_observation`."""
        observation, rewards, terminations, truncations, infos = self.env.step(self._actions)
        dones = np.logical_or(terminations, truncations)
        rows = []
        for row, done in enumerate(dones):
            info = row_info(infos["final_info"] if done else infos, row)
            info["TimeLimit.truncated"] = bool(truncations[row] and not terminations[row])
            if done:
                info["terminal_observation"] = infos["final_obs"][row]
                self.reset_infos[row] = row_info(infos, row)
            rows.append(info)
        return observation, np.asarray(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The environment's attribute, once for each row asked for."""
        return [getattr(self.env.unwrapped, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets the environment's attribute, for all rows."""
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(
                f"all rows share one environment, so {attr_name!r} cannot be set for rows {indices} alone; leave out "
                "indices."
            )
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method that answers for all rows (`action_masks`, `render`) and gives the answers of some."""
        answer = getattr(self.env.unwrapped, method_name)(*method_args, **method_kwargs)
        answers = [None] * self.num_envs if answer is None else answer
        if not isinstance(answers, Sequence | np.ndarray) or len(answers) != self.num_envs:
            raise ValueError(
                f"{method_name!r} must answer once a row, {self.num_envs} times, to be called through env_method, got "
                f"{type(answer).__name__}; call it on the environment itself (the adapter's `env`)."
            )
        return [answers[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """False: rows are no environments of their own that could be wrapped."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray | None]:
        """One picture a row, where the environment's `render_mode` is `rgb_array`."""
        return self.env_method("render")
