"""NetworkFactory on plain vectors, rows of one step: what TorchRL's own losses can read too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.objectives.actor_critic import Categorical

OBSERVATION, ACTIONS = 4, 3


class VectorNetwork(nn.Module):
    """A number for each action, from an observation."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(OBSERVATION, 16), nn.Tanh(), nn.Linear(16, ACTIONS))
        self.register_buffer("epsilon", torch.zeros(()))

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation)

    def distribution(self, batch: TensorDict) -> Categorical:
        return Categorical(self(batch["observation"]))

    def all_states(self, batch: TensorDict) -> Tensor:
        return self(torch.cat([batch["observation"], batch["next_observation"]], 1))  # [B, 2, A]


class VectorNetworks:
    """See `agents.interfaces.NetworkFactory`."""

    group_size = 1

    def __init__(self, alpha: float = 0.0, discrete: bool = True) -> None:
        self.alpha, self.discrete, self.made = alpha, discrete, 0

    def map_states(self, function: Callable[..., Tensor], values: Sequence[Tensor], *others: Tensor) -> Tensor:
        return function(*values, *(nn.functional.pad(other, (0, 1)) for other in others))

    def actor(self) -> VectorNetwork:
        return self._network()

    def q_network(self, alpha: float) -> VectorNetwork:
        return self._network()

    def _network(self) -> VectorNetwork:
        self.made += 1
        return VectorNetwork(self.made)


def make_batch(rows: int = 16) -> TensorDict:
    """Steps, some of which end an episode, some of those by a time limit."""
    generator = torch.Generator().manual_seed(1)
    done = torch.rand(rows, 1, generator=generator) < 0.5
    return TensorDict(
        {
            "observation": torch.randn(rows, 1, OBSERVATION, generator=generator),
            "next_observation": torch.randn(rows, 1, OBSERVATION, generator=generator),
            "action": torch.randint(ACTIONS, (rows, 1), generator=generator),
            "reward": torch.randn(rows, 1, generator=generator),
            "mask": torch.ones(rows, 1, dtype=torch.bool),
            "done": done,
            "terminated": done & (torch.rand(rows, 1, generator=generator) < 0.5),
        },
        batch_size=[rows],
    )


def as_torchrl(batch: TensorDict) -> TensorDict:
    """The same steps as TorchRL's losses expect them."""
    following = {name: batch[name] for name in ("reward", "done", "terminated")}
    following["observation"] = batch["next_observation"][:, 0]
    return TensorDict(
        {
            "observation": batch["observation"][:, 0],
            "action": batch["action"][:, 0],
            "next": TensorDict(following, batch_size=batch.batch_size),
        },
        batch_size=batch.batch_size,
    )
