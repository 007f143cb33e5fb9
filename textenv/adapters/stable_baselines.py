"""Gymnasium vector environments as Stable-Baselines3 `VecEnv`s.

The only file of textenv that imports stable_baselines3 (`pip install textenv[sb3]`). It changes the layout, not the
numbers: it returns the same as SB3's `DummyVecEnv` of single environments, at the speed of the native environment.
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

    `VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=32, autoreset_mode="SameStep"))`; wrap it in
    SB3's `VecMonitor` to log episode returns. `env_method` splits the result of methods that return one value per row,
    such as `action_masks` and `render`. Attributes belong to the vector environment and are the same for every row.
    """

    def __init__(self, env: VectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode") if isinstance(env, VectorEnv) else None
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "Stable-Baselines3 expects the step that ends an episode to return the first observation of the next, "
                f"so VecEnvAdapter takes a vector environment with autoreset_mode SAME_STEP, got {mode} of {env}; make "
                'it with gym.make_vec(..., autoreset_mode="SameStep").'
            )
        self.env = env
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Start an episode in every row, with the seeds and options set by `seed` and `set_options`."""
        options: dict[str, Any] = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError(
                "this environment takes the same reset options for all rows; call set_options with one dict, got "
                f"{self._options}."
            )
        seeds: Any = None if all(seed is None for seed in self._seeds) else self._seeds
        observation, infos = self.env.reset(seed=seeds, options=options or None)
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray) -> None:
        """Store the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every row. A row that ends returns the next episode's first observation, and `terminal_observation`."""
        observation, rewards, terminations, truncations, infos = self.env.step(self._actions)
        dones = np.logical_or(terminations, truncations)
        row_infos = []
        for row, done in enumerate(dones):
            info = row_info(infos["final_info"] if done else infos, row)
            info["TimeLimit.truncated"] = bool(truncations[row] and not terminations[row])
            if done:
                info["terminal_observation"] = infos["final_obs"][row]
                self.reset_infos[row] = row_info(infos, row)
            row_infos.append(info)
        return observation, np.asarray(rewards, dtype=np.float32), dones, row_infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The environment's attribute, once per requested row."""
        return [getattr(self.env.unwrapped, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the environment's attribute, for all rows. Raises ValueError for some rows only."""
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(
                f"all rows share one environment, so {attr_name!r} cannot be set for rows {indices} only; leave out "
                "indices."
            )
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method that returns one value per row, and return the values of the requested rows."""
        result = getattr(self.env.unwrapped, method_name)(*method_args, **method_kwargs)
        results = [None] * self.num_envs if result is None else result
        if not isinstance(results, Sequence | np.ndarray) or len(results) != self.num_envs:
            raise ValueError(
                f"{method_name!r} must return one value per row, {self.num_envs} in all, to work with env_method, "
                f"got {type(result).__name__}; call it on the environment itself (the adapter's `env`)."
            )
        return [results[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """False for every row: rows are not separate environments, so they cannot be wrapped."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray | None]:
        """One image per row, if the environment's `render_mode` is `rgb_array`."""
        return self.env_method("render")
