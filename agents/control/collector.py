"""Collects fixed-length rollouts from parallel environments.

Keys of a rollout, batch size [B] environments: `observation` and `next_observation` [B, R, D]; `action` [B, R] or
[B, R, A]; `action_log_prob`, `step_score`, the environment's reward, `mask`, `done` and `terminated` [B, R]; and
`raw_observation`, `raw_next_observation` and `raw_step_score`, the same before normalization. The mask leaves out steps
that only reset an environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from agents.control.config import ControlConfig
from agents.control.environments import Environments
from agents.ranks import ALONE, Ranks
from agents.reporting.phases import phase
from agents.seeds import seed_of, torch_generator
from textenv.state import own_settings

ON_POLICY = ("observation", "action", "action_log_prob", "mask", "state_value", "advantage", "value_target")
REPLAYED = ("raw_observation", "raw_next_observation", "action", "raw_step_score", "done", "terminated", "mask")


@dataclass(frozen=True)
class ControlRollout:
    """The next steps of every environment, and metrics of them."""

    data: TensorDict
    metrics: dict[str, float]


class ControlCollector:
    """See `agents.interfaces.Collector`.

    Environment states cannot be saved. So every run resets all environments after each checkpoint, whether or not it
    stops there, and a resumed run continues exactly like an uninterrupted one.
    """

    unit = "frames"
    in_step = False
    modules: Mapping[str, nn.Module] = {}
    autocast = staticmethod(nullcontext)  # float32

    def __init__(
        self,
        environments: Environments,
        config: ControlConfig,
        seed: int,
        reset_every: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """reset_every: iterations between resets of all environments, equal to those between checkpoints.

        ranks: the first plays; the others learn from what it has played.
        """
        self.environments, self.config, self.ranks = environments, config, ranks
        self.seed, self.reset_every = seed, reset_every
        self.resets = 0  # of all environments together; each has a seed of its own
        self.observation: np.ndarray | None = None  # [B, D]; None: reset before the next step
        self.generator = torch_generator(seed, "sampling")

    def collect(self, policy: Any) -> ControlRollout:
        """Run `steps` steps in every environment."""
        rollout, statistics = self.ranks.lead(lambda: (self._play(policy), self.environments.state_dict()))
        if not self.ranks.first:
            self.environments.load_state_dict(statistics)
        return rollout

    @own_settings()
    @phase("play")
    def _play(self, policy: Any) -> ControlRollout:
        env, shape = self.environments.env, (self.config.steps, self.config.num_envs)
        if self.observation is None:
            self.resets += 1
            self.observation = self.environments.reset(seed_of(self.seed, "resets", self.resets))
            self.ended = np.zeros(shape[1], dtype=bool)
        observation_array = np.empty((shape[0] + 1, *self.observation.shape), np.float32)  # [R + 1, B, D]
        observations = torch.from_numpy(observation_array)  # shares memory; the environment may reuse its own
        raw_array, raw_rewards = np.empty_like(observation_array), np.empty(shape, np.float32)
        raw = self.environments.raw
        actions: list[torch.Tensor] = []
        rewards, ended = np.empty(shape, np.float32), np.empty((shape[0] + 1, shape[1]), bool)
        terminated = np.empty(shape, bool)
        sample_action = policy.action_sampler(*shape, self.generator)
        for step, state in enumerate(observations[:-1].unbind()):
            observation_array[step], raw_array[step], ended[step] = self.observation, raw.observation, self.ended
            actions.append(sample_action(state))
            action = clip_action(actions[-1].numpy(), env.single_action_space)
            self.observation, rewards[step], terminated[step], truncated, _ = env.step(action)
            raw_rewards[step], self.ended = raw.reward, terminated[step] | truncated
        observation_array[-1], raw_array[-1], ended[-1] = self.observation, raw.observation, self.ended
        check_finite(raw_array, raw_rewards)
        raw_observations = torch.from_numpy(raw_array).transpose(0, 1)  # [B, R + 1, D]
        observation, action = observations[:-1].transpose(0, 1), torch.stack(actions, 1)  # [B, R, ...] both
        reward = torch.from_numpy(rewards).T  # [B, R]
        mask = ~torch.from_numpy(ended[:-1]).T
        data = TensorDict(
            {
                "observation": observation,
                "next_observation": observations[1:].transpose(0, 1),
                "action": action,
                "action_log_prob": policy.log_prob(observation, action),
                "mask": mask,
                "done": torch.from_numpy(ended[1:]).T & mask,
                "terminated": torch.from_numpy(terminated).T & mask,
                "step_score": reward,
                "raw_observation": raw_observations[:, :-1],
                "raw_next_observation": raw_observations[:, 1:],
                "raw_step_score": torch.from_numpy(raw_rewards).T,
            },
            batch_size=[shape[1]],
        )
        return ControlRollout(data, self._metrics(data))

    def training_rows(self, data: TensorDict) -> TensorDict:
        """Valid steps as N rows of one step, [N, 1, ...]."""
        present = set(data.keys())
        return single_steps(data, [key for key in ON_POLICY if key in present])

    def replay_rows(self, data: TensorDict) -> TensorDict:
        """Valid steps as N rows of one step, [N, 1, ...], before normalization."""
        return single_steps(data, REPLAYED)

    def from_replay(self, rows: TensorDict) -> TensorDict:
        """Rows with `observation`, `next_observation` and `step_score`, normalized by the present statistics."""
        raw: dict[str, Any] = {name: value.numpy() for name, value in rows.items()}
        for name in ("observation", "next_observation"):
            rows[name] = torch.from_numpy(self.environments.normalized_observations(raw[f"raw_{name}"]))
        rows["step_score"] = torch.from_numpy(self.environments.normalized_rewards(raw["raw_step_score"])).float()
        return rows.exclude("raw_observation", "raw_next_observation", "raw_step_score")

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """This rank's rows, together: these networks are small."""
        rows = self.ranks.deal(minibatch)
        if len(rows):
            yield rows

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Reset all environments after iterations with a checkpoint."""
        if iteration % self.reset_every == 0:
            self.observation = None

    def state_dict(self) -> dict[str, Any]:
        """Count of resets, generator and running statistics."""
        return {
            "resets": self.resets,
            "generator": self.generator.get_state(),
            "statistics": self.environments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.resets, self.observation = int(state["resets"]), None
        self.generator.set_state(state["generator"].cpu())
        self.load_statistics(state)

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Restore the normalization of observations and rewards alone."""
        self.environments.load_state_dict(state["statistics"])

    def _metrics(self, data: TensorDict) -> dict[str, float]:
        episodes = self.environments.returns.take()
        metrics = {"entropy": float(-data["action_log_prob"][data["mask"]].mean())}
        if episodes:
            metrics["return"] = float(np.mean([episode.total for episode in episodes]))
            metrics["length"] = float(np.mean([episode.length for episode in episodes]))
        return metrics


def single_steps(data: TensorDict, keys: Sequence[str]) -> TensorDict:
    """The valid steps of a rollout as N rows of one step, [N, 1, ...]."""
    mask = data["mask"]
    rows = {key: data[key][mask][:, None] for key in keys}
    return TensorDict(rows, batch_size=[len(rows["mask"])])


def check_finite(observations: np.ndarray, rewards: np.ndarray) -> None:
    """Raise ValueError for numbers of an environment that are not finite.

    observations: [R + 1, B, D]; rewards: [R, B].
    """
    for name, values in (("observation", observations), ("reward", rewards)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, row = bad[0][:2]
            raise ValueError(
                f"the environment's {name} is {values[tuple(bad[0])]} in row {row} at step {step} of the rollout; "
                "every observation and reward must be a finite number."
            )


def clip_action(action: np.ndarray, space: Any) -> np.ndarray:
    """Clip continuous actions [B, A] to the bounds of the space; return discrete actions [B] unchanged."""
    return np.clip(action, space.low, space.high) if action.ndim > 1 else action
