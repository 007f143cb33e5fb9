"""The whole KL penalty in `step`: the action holds the token and the policy's log-probability of it.

For clients that need the full reward, score − β · KL, from the environment. This reward depends on the policy that
chose the token, so it is right for on-policy learning; from a replay buffer it is the penalty of an old policy.
`WholePenalty` wraps one environment, `VectorWholePenalty` a vector environment.
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
from textenv.kl import ESTIMATORS, Controller, FixedKL
from textenv.task import Task
from textenv.vector_env import TextGenVectorEnv

# The log-probability of an almost certain token may exceed 0 by a float32 rounding error.
ROUNDING = 1e-5


class WholePenalty(gym.Wrapper, RecordConstructorArgs):
    """Pays `score − β · KL` in `step`, whose action is `{"token": id, "log_prob": log π(id|s)}`.

    It removes the environment's half of the penalty from the reward, and subtracts `β · estimator(log_prob,
    reference_log_prob)`, which is `info["penalty"]`. With k1 and the environment's own β, the result is
    `reward − β · log_prob`. `log_prob` is the policy's log-probability at the environment's temperature, under the
    distribution that the token was sampled from. Apply this wrapper inside wrappers that change rewards or infos, or
    restart episodes.

    estimator: k1, k2 or k3 (kl.py compares them). controller: sets β; by default β stays at the environment's
    `kl_coef`. An `AdaptiveKL` is updated with the KL of every episode at its end.
    """

    def __init__(self, env: gym.Env, estimator: str = "k1", controller: Controller | None = None) -> None:
        RecordConstructorArgs.__init__(self, estimator=estimator, controller=controller)
        gym.Wrapper.__init__(self, env)
        self._ledger = _PenaltyLedger(_task_of(env.unwrapped), 1, estimator, controller)
        self.action_space = _with_log_prob(env.action_space)

    @property
    def controller(self) -> Controller:
        """The controller of β."""
        return self._ledger.controller

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        result = self.env.reset(seed=seed, options=options)
        self._ledger.clear(np.ones(1, dtype=bool))
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step with a token and its log-probability. Raises ValueError, before stepping, for an invalid `log_prob`."""
        token, log_prob = _split(action)
        active = np.ones(1, dtype=bool)
        log_probs = self._ledger.check(log_prob, active)
        observation, reward, terminated, truncated, info = self.env.step(token)
        reference = np.array([info.get("reference_log_prob", np.nan)])
        rewards, penalties = self._ledger.charge(np.array([reward], dtype=float), log_probs, reference, active)
        self._ledger.count(active, np.array([terminated or truncated]))
        info = {**info, "penalty": float(penalties[0])}
        return observation, float(rewards[0]), terminated, truncated, info


class VectorWholePenalty(VectorWrapper):
    """`WholePenalty` for the native vector environment and for `SyncVectorEnv`, with equal results at every step.

    Actions are `{"token": [B], "log_prob": [B]}`. A row that resets instead of taking its token (NEXT_STEP) pays
    nothing, and its `log_prob` is ignored: it may be NaN. All rows share one controller, which is updated once per
    step with all episodes that end in it.
    """

    def __init__(self, env: VectorEnv, estimator: str = "k1", controller: Controller | None = None) -> None:
        super().__init__(env)
        self._ledger = _PenaltyLedger(_task_of(env.unwrapped), env.num_envs, estimator, controller)
        self.single_action_space = _with_log_prob(env.single_action_space)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self._mode = env.metadata["autoreset_mode"]
        self._resting = np.zeros(env.num_envs, dtype=bool)  # rows that will reset at the next step

    @property
    def controller(self) -> Controller:
        """The controller of β."""
        return self._ledger.controller

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes in all rows, or in the rows of `options["reset_mask"]`."""
        mask = (options or {}).get("reset_mask")
        started = np.ones(self.num_envs, dtype=bool) if mask is None else np.array(mask)
        result = self.env.reset(seed=seed, options=options)  # SyncVectorEnv removes the mask from options
        self._ledger.clear(started)
        self._resting = self._resting & ~started
        return result

    def step(self, actions: Any) -> tuple[Any, NDArray, NDArray, NDArray, dict[str, Any]]:
        """Step every row. Raises ValueError, before stepping, for an invalid `log_prob`, and names its row."""
        tokens, log_prob = _split(actions)
        active = ~self._resting
        log_probs = self._ledger.check(log_prob, active)
        observation, reward, terminated, truncated, infos = self.env.step(tokens)
        ended = terminated | truncated
        reference = _reference_log_probs(infos, self.num_envs)
        rewards, penalties = self._ledger.charge(reward, log_probs, reference, active)
        self._ledger.count(active, ended)
        self._resting = ended & (self._mode is AutoresetMode.NEXT_STEP)
        return observation, rewards, terminated, truncated, self._with_penalties(infos, penalties, active, ended)

    def _with_penalties(
        self, infos: dict[str, Any], penalties: NDArray, active: NDArray, ended: NDArray
    ) -> dict[str, Any]:
        """Add the penalties where Gymnasium's vector environments put a row's info."""
        final = ended & (self._mode is AutoresetMode.SAME_STEP)
        if final.any():
            infos = {**infos, "final_info": infos["final_info"] | _penalty_info(penalties, final)}
        continuing = active & ~final
        return infos | _penalty_info(penalties, continuing) if continuing.any() else infos


class _PenaltyLedger:
    """Computes the penalties of B rows, and accumulates KL and tokens of their current episodes. Arrays are [B]."""

    def __init__(self, task: Task, rows: int, estimator: str, controller: Controller | None) -> None:
        self.kl_coef, self.estimator = task.config.kl_coef, estimator
        if estimator not in tuple(ESTIMATORS):
            raise ValueError(
                f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}; the exact KL needs the "
                "policy's whole distribution, which an action does not contain."
            )
        if isinstance(controller, int | float):
            raise ValueError(
                f"controller must be a controller of textenv.kl, got {controller}; for a constant β pass FixedKL(β)."
            )
        if self.kl_coef == 0 and (estimator != "k1" or controller is not None):
            raise ValueError(
                f"the environment's kl_coef is 0, so there is no reference for estimator={estimator!r} or "
                f"controller={controller}; set kl_coef above 0, or leave both at their defaults."
            )
        self.controller = FixedKL(self.kl_coef) if controller is None else controller
        self.kl = np.zeros(rows)
        self.tokens = np.zeros(rows, dtype=np.int64)

    def check(self, log_prob: Any, active: NDArray) -> NDArray:
        """Convert log-probabilities to float64: checked in active rows, 0 in the others. Raises ValueError."""
        log_probs = np.where(active, _as_numbers(log_prob, len(active)), 0.0)
        invalid = ~(np.isfinite(log_probs) & (log_probs <= ROUNDING))
        if invalid.any():
            row = int(invalid.argmax())
            raise ValueError(
                f"log_prob {log_probs[row]:g} in row {row} is not a log-probability; give a finite "
                "number of at most 0, log π(token | state) at the environment's temperature."
            )
        largest = ESTIMATORS[self.estimator](torch.from_numpy(log_probs), torch.zeros(1))  # at π_ref = 1
        overflows = ~largest.float().isfinite().numpy()
        if overflows.any():
            row = int(overflows.argmax())
            raise ValueError(
                f"log_prob {log_probs[row]:g} in row {row} is too low for the {self.estimator} estimator, which may "
                "overflow there; use estimator='k1'."
            )
        return log_probs

    def charge(
        self, reward: NDArray, log_probs: NDArray, reference: NDArray, active: NDArray
    ) -> tuple[NDArray, NDArray]:
        """The penalized rewards and the penalties, float64 [B] each. Inactive rows get zeros.

        reference: NaN where `info` has no `reference_log_prob`, because a wrapper below reset the episode instead of
        taking the token, or dropped the info. Raises ValueError for an active row with NaN.
        """
        reference = np.where(active, reference, 0.0) if self.kl_coef > 0 else np.zeros_like(log_probs)
        if np.isnan(reference).any():
            raise ValueError(
                "the environment's info has no reference_log_prob for this token, so its penalty is unknown; apply "
                "this wrapper inside wrappers that restart episodes or change infos, such as Autoreset."
            )
        paid, log_prob, reference_log_prob = (torch.from_numpy(array) for array in (reward, log_probs, reference))
        kl = ESTIMATORS[self.estimator](log_prob, reference_log_prob)
        penalty = self.controller.coef * kl
        self.kl += kl.numpy()
        score = paid - self.kl_coef * reference_log_prob  # the environment has paid its half of the penalty
        return (score - penalty).numpy(), penalty.numpy()

    def count(self, active: NDArray, ended: NDArray) -> None:
        """Count a token in active rows, and update the controller with the episodes that ended."""
        self.tokens += active
        if ended.any():
            self.controller.update(float(self.kl[ended].sum()), int(self.tokens[ended].sum()), int(ended.sum()))
            self.clear(ended)

    def clear(self, rows: NDArray) -> None:
        """Set KL and tokens of these rows to zero."""
        self.kl[rows], self.tokens[rows] = 0.0, 0


def _task_of(env: Any) -> Task:
    """The task of a TextGen-v0 environment, single or vector. Raises ValueError for other environments."""
    if isinstance(env, TextGenEnv | TextGenVectorEnv):
        return env.task
    if isinstance(env, SyncVectorEnv):
        return _task_of(env.envs[0].unwrapped)
    raise ValueError(
        f"WholePenalty wraps TextGen-v0, its native vector environment and SyncVectorEnv, got "
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


def _as_numbers(log_prob: Any, rows: int) -> NDArray[np.float64]:
    array = np.asarray(log_prob.detach().cpu().double() if isinstance(log_prob, torch.Tensor) else log_prob)
    if array.dtype.kind not in "fiu" or array.size != rows:
        raise ValueError(f"log_prob must be {'one number' if rows == 1 else f'{rows} numbers'}, got {log_prob!r}.")
    return array.reshape(rows).astype(np.float64)


def _reference_log_probs(infos: dict[str, Any], rows: int) -> NDArray[np.float64]:
    """The log π_ref of the tokens just taken, NaN if missing. In SAME_STEP mode a last token's is in `final_info`."""
    log_probs = np.full(rows, np.nan)
    for part in (infos, infos.get("final_info", {})):
        if "reference_log_prob" in part:
            log_probs = np.where(part["_reference_log_prob"], part["reference_log_prob"], log_probs)
    return log_probs


def _penalty_info(penalties: NDArray, rows: NDArray) -> dict[str, NDArray]:
    return {"penalty": np.where(rows, penalties, 0.0), "_penalty": rows.copy()}
