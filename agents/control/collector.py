"""Plays environments side by side for a trainer, one stretch of steps after another.

Keys of a rollout, batch size [B] environments: `observation` and `next_observation` [B, R, D]; `action` [B, R] or
[B, R, A]; `action_log_prob`, `reward` (also as `shaped_reward` and `task_reward`: there is no penalty), `mask`,
`done` and `terminated` [B, R]. The mask leaves out steps that only begin a new episode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from agents.control.config import ControlConfig
from agents.control.environments import Environments

ON_POLICY = ("observation", "action", "action_log_prob", "mask", "state_value", "advantage", "value_target")
OFF_POLICY = ("observation", "next_observation", "action", "reward", "done", "terminated", "mask")


@dataclass(frozen=True)
class ControlRollout:
    """A stretch of every environment's steps, and what it shows."""

    data: TensorDict
    metrics: dict[str, float]


class ControlCollector:
    """One rollout after another: see `agents.interfaces.Collector`.

    Environments cannot be saved. So all episodes begin anew after every checkpoint, in a run that is never stopped
    too, and a resumed run goes on exactly as that one did.
    """

    unit = "frames"
    modules: Mapping[str, nn.Module] = {}

    def __init__(self, environments: Environments, config: ControlConfig, seed: int, begin_every: int) -> None:
        """begin_every: iterations after which all episodes begin anew, those between checkpoints."""
        self.environments, self.config = environments, config
        self.seed, self.begin_every = seed, begin_every
        self.begun = 0  # times that all episodes began anew
        self.observation: np.ndarray | None = None  # [B, D]; None: to begin anew
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def collect(self, policy: Any) -> ControlRollout:
        """Every environment's next steps."""
        env, shape = self.environments.env, (self.config.steps, self.config.num_envs)
        if self.observation is None:
            self.begun += 1
            seed = np.random.SeedSequence([self.seed, self.begun]).generate_state(1)[0]
            self.observation = self.environments.reset(int(seed))
            self.ended = np.zeros(shape[1], dtype=bool)
        seen = np.empty((shape[0] + 1, *self.observation.shape), np.float32)  # [R + 1, B, D]
        observations, actions = torch.from_numpy(seen), []  # one memory, that copies what an environment may reuse
        rewards, ended = np.empty(shape, np.float32), np.empty((shape[0] + 1, shape[1]), bool)
        terminated = np.empty(shape, bool)
        act = policy.player(*shape, self.generator)
        for step, state in enumerate(observations[:-1].unbind()):
            seen[step], ended[step] = self.observation, self.ended
            actions.append(act(state))
            action = playable(actions[-1].numpy(), env.single_action_space)
            self.observation, rewards[step], terminated[step], truncated, _ = env.step(action)
            self.ended = terminated[step] | truncated
        seen[-1], ended[-1] = self.observation, self.ended
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
                "reward": reward,
                "shaped_reward": reward,
                "task_reward": reward,
            },
            batch_size=[shape[1]],
        )
        return ControlRollout(data, self._metrics(data))

    def training_rows(self, data: TensorDict) -> TensorDict:
        """Single steps, [N] rows of [1]."""
        known, mask = set(data.keys()), data["mask"]
        keys = ON_POLICY if "advantage" in known else OFF_POLICY
        rows = {key: data[key][mask][:, None] for key in keys if key in known}
        return TensorDict(rows, batch_size=[len(rows["mask"])])

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """All at once: these networks are small."""
        yield minibatch

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Begins anew where a checkpoint is."""
        if iteration % self.begin_every == 0:
            self.observation = None

    def state_dict(self) -> dict[str, Any]:
        """Generators and running statistics."""
        return {
            "begun": self.begun,
            "generator": self.generator.get_state(),
            "statistics": self.environments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.begun, self.observation = int(state["begun"]), None
        self.generator.set_state(state["generator"].cpu())
        self.environments.load_state_dict(state["statistics"])

    def _metrics(self, data: TensorDict) -> dict[str, float]:
        episodes = self.environments.returns.take()
        metrics = {"entropy": float(-data["action_log_prob"][data["mask"]].mean())}
        if episodes:
            metrics["return"] = float(np.mean([episode.total for episode in episodes]))
            metrics["length"] = float(np.mean([episode.length for episode in episodes]))
        return metrics


def playable(action: np.ndarray, space: Any) -> np.ndarray:
    """Continuous actions clipped to their bounds; others as they are."""
    return np.clip(action, space.low, space.high) if action.ndim > 1 else action
