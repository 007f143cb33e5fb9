"""The whole penalty in `step`: the action carries the policy's log-probability beside the token (DESIGN §2).

For clients that want the full reward, score − β · KL, from the environment itself. Such a reward depends on the
policy that chose the token, so it is right for learning from one's own fresh episodes; from a replay buffer it is
the penalty of an old policy. `WholePenalty` wraps one environment, `VectorWholePenalty` a vector of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from textenv.env import TextGenEnv
from textenv.kl import ESTIMATORS, Controller, FixedKL, shaped_reward
from textenv.task import Task
from textenv.vector_env import TextGenVectorEnv

# A policy's log-probability of a token that it is all but sure of may come out above 0, by a rounding of float32.
ROUNDING = 1e-5


class WholePenalty(gym.Wrapper, RecordConstructorArgs):
    """Pays `score − β · KL` in `step`, whose action is `{"token": id, "log_prob": log π(id|s)}`.

    The reward is the environment's, less its half of the penalty, less `β · estimator(log_prob,
    reference_log_prob)`: with k1 and the environment's own β it is `reward − β · log_prob`. `info["penalty"]` is
    what was subtracted. `log_prob` is the policy's at the environment's temperature, under the distribution that the
    token was sampled from. Place it inside wrappers that change rewards or infos, or restart episodes.

    estimator: k1, k2 or k3 (kl.py says what each is good for). controller: who sets β; by default it stays at the
    environment's `kl_coef`. An `AdaptiveKL` looks at the KL of every episode at its end.
    """

    def __init__(self, env: gym.Env, estimator: str = "k1", controller: Controller | None = None) -> None:
        RecordConstructorArgs.__init__(self, estimator=estimator, controller=controller)
        gym.Wrapper.__init__(self, env)
        self.account = _PenaltyLedger(_task_of(env.unwrapped), 1, estimator, controller)
        self.action_space = _with_log_prob(env.action_space)

    @property
    def controller(self) -> Controller:
        """Who sets β."""
        return self.account.controller

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode, as the environment does."""
        answer = self.env.reset(seed=seed, options=options)
        self.account.forget(np.ones(1, dtype=bool))
        return answer

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Writes one token and pays for it. Raises ValueError, before anything is done, for a bad `log_prob`."""
        token, log_prob = _split(action)
        everyone = np.ones(1, dtype=bool)
        log_probs = self.account.read(log_prob, everyone)
        observation, reward, terminated, truncated, info = self.env.step(token)
        reference = np.array([info.get("reference_log_prob", np.nan)])
        rewards, penalties = self.account.charge(np.array([reward], dtype=float), log_probs, reference, everyone)
        self.account.close(everyone, np.array([terminated or truncated]))
        info = {**info, "penalty": float(penalties[0])}
        return observation, float(rewards[0]), terminated, truncated, info


class VectorWholePenalty(VectorWrapper):
    """`WholePenalty` for the native vector environment and for `SyncVectorEnv`, step for step the same.

    Actions are `{"token": [n], "log_prob": [n]}`. A row that starts anew instead of taking its token (NEXT_STEP)
    pays nothing, and its `log_prob` is not read: it may be NaN. All rows share one controller, which is told of the
    episodes that end in a step together.
    """

    def __init__(self, env: VectorEnv, estimator: str = "k1", controller: Controller | None = None) -> None:
        super().__init__(env)
        self.account = _PenaltyLedger(_task_of(env.unwrapped), env.num_envs, estimator, controller)
        self.single_action_space = _with_log_prob(env.single_action_space)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self._mode = env.metadata["autoreset_mode"]
        self._resting = np.zeros(env.num_envs, dtype=bool)  # rows that will start anew at the next step

    @property
    def controller(self) -> Controller:
        """Who sets β."""
        return self.account.controller

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts episodes in all rows, or in those of `options["reset_mask"]`."""
        mask = (options or {}).get("reset_mask")
        started = np.ones(self.num_envs, dtype=bool) if mask is None else np.array(mask)
        answer = self.env.reset(seed=seed, options=options)  # SyncVectorEnv takes the mask out of options
        self.account.forget(started)
        self._resting = self._resting & ~started
        return answer

    def step(self, actions: Any) -> tuple[Any, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Writes one token a row and pays for them. Raises ValueError, before anything is done, for a bad row."""
        tokens, log_prob = _split(actions)
        active = ~self._resting
        log_probs = self.account.read(log_prob, active)
        observation, reward, terminated, truncated, infos = self.env.step(tokens)
        ended = terminated | truncated
        reference = _reference_log_probs(infos, self.num_envs)
        rewards, penalties = self.account.charge(reward, log_probs, reference, active)
        self.account.close(active, ended)
        self._resting = ended & (self._mode is AutoresetMode.NEXT_STEP)
        return observation, rewards, terminated, truncated, self._infos(infos, penalties, active, ended)

    def _infos(self, infos: dict[str, Any], penalties: NDArray, active: NDArray, ended: NDArray) -> dict[str, Any]:
        """With penalties where Gymnasium's own vector environments would put them."""
        final = ended & (self._mode is AutoresetMode.SAME_STEP)
        if final.any():
            infos = {**infos, "final_info": infos["final_info"] | _entry(penalties, final)}
        shown = active & ~final
        return infos | _entry(penalties, shown) if shown.any() else infos


class _PenaltyLedger:
    """What rows owe for leaving the reference, and the KL of their episodes so far. Arrays are [B]."""

    def __init__(self, task: Task, rows: int, estimator: str, controller: Controller | None) -> None:
        self.kl_coef, self.estimator = task.config.kl_coef, estimator
        if estimator not in tuple(ESTIMATORS):
            raise ValueError(
                f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}; the exact KL would need the "
                "policy's whole distribution, which an action does not carry."
            )
        if isinstance(controller, int | float):
            raise ValueError(f"controller must be one of textenv.kl, got {controller}; for a fixed β give FixedKL(β).")
        if self.kl_coef == 0 and (estimator != "k1" or controller is not None):
            raise ValueError(
                f"the environment's kl_coef is 0, so there is no reference to measure estimator={estimator!r} or "
                f"controller={controller} by; make it with kl_coef above 0, or leave both at their defaults."
            )
        self.controller = FixedKL(self.kl_coef) if controller is None else controller
        self.kl = np.zeros(rows)
        self.tokens = np.zeros(rows, dtype=np.int64)

    def read(self, given: Any, active: NDArray) -> NDArray:
        """Log-probabilities as float64: those of active rows checked, 0 in the others."""
        log_probs = np.where(active, _as_numbers(given, len(active)), 0.0)
        wrong = ~(np.isfinite(log_probs) & (log_probs <= ROUNDING))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"log_prob {log_probs[row]:g} in row {row} is no log-probability of a sampled token; give a finite "
                "number of at most 0, log π(token | state) at the environment's temperature."
            )
        worst = ESTIMATORS[self.estimator](torch.from_numpy(log_probs), torch.zeros(1))  # if the reference is sure
        wrong = ~worst.float().isfinite().numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"log_prob {log_probs[row]:g} in row {row} is too low for the {self.estimator} estimator, which may "
                "overflow there; use estimator='k1'."
            )
        return log_probs

    def charge(
        self, reward: NDArray, log_probs: NDArray, reference: NDArray, active: NDArray
    ) -> tuple[NDArray, NDArray]:
        """The whole rewards, and the penalties in them, float64. Rows that are not active have zeros throughout.

        reference: NaN where no `info` told it; then a token was asked for and none written, or infos were lost.
        """
        reference = np.where(active, reference, 0.0) if self.kl_coef > 0 else np.zeros_like(log_probs)
        if np.isnan(reference).any():
            raise ValueError(
                "the environment's info has no reference_log_prob for this token, so it cannot be charged; place this "
                "wrapper inside those that restart episodes or change infos, such as Autoreset."
            )
        paid, log_prob, reference_log_prob = (torch.from_numpy(array) for array in (reward, log_probs, reference))
        kl = ESTIMATORS[self.estimator](log_prob, reference_log_prob)
        penalty = self.controller.coef * kl
        self.kl += kl.numpy()
        return shaped_reward(paid, reference_log_prob, self.kl_coef, penalty).numpy(), penalty.numpy()

    def close(self, active: NDArray, ended: NDArray) -> None:
        """Counts a token in active rows, and tells the controller of the episodes that have ended."""
        self.tokens += active
        if ended.any():
            self.controller.update(float(self.kl[ended].sum()), int(self.tokens[ended].sum()), int(ended.sum()))
            self.forget(ended)

    def forget(self, rows: NDArray) -> None:
        """Rows start anew."""
        self.kl[rows], self.tokens[rows] = 0.0, 0


def _task_of(env: Any) -> Task:
    """The task of an environment that is TextGen-v0, or that holds several of it."""
    if isinstance(env, TextGenEnv | TextGenVectorEnv):
        return env.task
    if isinstance(env, SyncVectorEnv):
        return _task_of(env.envs[0].unwrapped)
    raise ValueError(
        f"the whole penalty is for TextGen-v0, its native vector environment and SyncVectorEnv, got "
        f"{type(env).__name__}; in another vector environment, wrap each single TextGen-v0 in WholePenalty."
    )


def _with_log_prob(tokens: gym.Space) -> spaces.Dict:
    return spaces.Dict(token=tokens, log_prob=spaces.Box(-np.inf, 0.0, (), np.float32))


def _split(action: Any) -> tuple[Any, Any]:
    if not isinstance(action, Mapping) or action.keys() != {"token", "log_prob"}:
        raise ValueError(
            f"an action must be {{'token': ..., 'log_prob': ...}}, got {action!r}; log_prob is the policy's "
            "log-probability of the token."
        )
    return action["token"], action["log_prob"]


def _as_numbers(given: Any, rows: int) -> NDArray[np.float64]:
    array = np.asarray(given.detach().cpu().double() if isinstance(given, torch.Tensor) else given)
    if array.dtype.kind not in "fiu" or array.size != rows:
        raise ValueError(f"log_prob must be {'one number' if rows == 1 else f'{rows} numbers'}, got {given!r}.")
    return array.reshape(rows).astype(np.float64)


def _reference_log_probs(infos: dict[str, Any], rows: int) -> NDArray[np.float64]:
    """Of the tokens just written; in mode SAME_STEP that of an episode's last one is in `final_info`."""
    found = np.full(rows, np.nan)
    for part in (infos, infos.get("final_info", {})):
        if "reference_log_prob" in part:
            found = np.where(part["_reference_log_prob"], part["reference_log_prob"], found)
    return found


def _entry(penalties: NDArray, rows: NDArray) -> dict[str, NDArray]:
    return {"penalty": np.where(rows, penalties, 0.0), "_penalty": rows.copy()}
