"""The policy of a run by itself: weights and observation statistics in a folder, without the trainer.

`policy.json` holds the sizes, `policy.safetensors` the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces.utils import flatten, flatten_space
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.control.collector import clip_action
from agents.control.environments import clip_observation
from agents.control.networks import MLP, ContinuousActor, DiscreteActor

SIZES, WEIGHTS = "policy.json", "policy.safetensors"
EPSILON = 1e-8  # added to the variance, as Gymnasium's NormalizeObservation does
MEAN, VARIANCE = "observation_mean", "observation_variance"

Network = DiscreteActor | ContinuousActor


def export_policy(network: Network, statistics: tuple[np.ndarray, np.ndarray] | None, folder: Path) -> None:
    """Write a policy network, and the mean and variance of the observations that it was trained on."""
    body = network.body if isinstance(network, ContinuousActor) else network
    sizes: dict[str, Any] = {"sizes": body.sizes, "activation": body.activation_name}
    sizes |= {"continuous": network is not body, "squashed": isinstance(network, ContinuousActor) and network.squashed}
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if statistics is not None:
        tensors |= {
            name: torch.from_numpy(array.copy()) for name, array in zip((MEAN, VARIANCE), statistics, strict=True)
        }
    folder.mkdir(exist_ok=True)
    (folder / SIZES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)


class ControlPlayer:
    """The deterministic policy of a run on a plain environment: see `agents.play.Player`."""

    def __init__(self, folder: Path, env: gym.Env) -> None:
        """Raises ValueError if the environment has other spaces than the one that the policy was trained on."""
        self.observations, self.actions = env.observation_space, env.action_space
        tensors = load_file(folder / WEIGHTS)
        self.mean, self.variance = (tensors.pop(name, None) for name in (MEAN, VARIANCE))
        self.network = _network(json.loads((folder / SIZES).read_text(encoding="utf-8")), tensors)
        self._check_spaces()

    @torch.no_grad()
    def __call__(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action for one observation."""
        row = np.asarray(flatten(self.observations, observation))[None]  # [1, D]
        if self.mean is not None and self.variance is not None:
            mean, variance = self.mean.numpy(), self.variance.numpy()
            row = clip_observation(((row - mean) / np.sqrt(variance + EPSILON)).astype(np.float32))
        action = self.network.greedy(torch.as_tensor(row, dtype=torch.float32)).numpy()
        return clip_action(action, self.actions)[0]

    def _check_spaces(self) -> None:
        body = self.network.body if isinstance(self.network, ContinuousActor) else self.network
        trained = (
            f"{body.sizes[0]} numbers, and {'' if body is self.network else 'continuous '}actions of {body.outputs}"
        )
        flat = flatten_space(self.observations) if self.observations.is_np_flattenable else None
        same = flat is not None and flat.shape == (body.sizes[0],)
        if body is self.network:
            same &= isinstance(self.actions, gym.spaces.Discrete) and self.actions.n == body.outputs
        else:
            same &= isinstance(self.actions, gym.spaces.Box) and self.actions.shape == (body.outputs,)
        if not same:
            raise ValueError(
                f"the policy was trained on observations of {trained}; the environment has {self.observations} and "
                f"{self.actions}. Make the environment of the run, with its arguments and wrappers."
            )


def _network(sizes: dict[str, Any], tensors: dict[str, Tensor]) -> Network:
    layers, activation = tuple(sizes["sizes"]), sizes["activation"]
    if sizes["continuous"]:
        bounds = (tensors["low"], tensors["high"]) if sizes["squashed"] else None
        network: Network = ContinuousActor(MLP(layers, activation, 1.0), 0.0, bounds)
    else:
        network = DiscreteActor(layers, activation, 1.0)
        tensors.pop("epsilon", None)  # of a Q-network: the share of random actions in training
    network.load_state_dict(tensors)
    return network
