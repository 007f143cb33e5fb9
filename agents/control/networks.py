"""Actors, critics and Q-networks of vector observations: small perceptrons, each with its own weights.

All read `observation` [B, R, D]. `all_states` also reads the last `next_observation`: rows are stretches of one
environment's steps, so s_1..s_{R-1} are among the observations already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import gymnasium as gym
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import IndependentNormal, TanhNormal

from agents.control.config import HIGHEST_LOG_STD, LOWEST_LOG_STD, ControlConfig
from agents.objectives.distributions import Categorical

# By activation: the module, and the function that writes into its input.
LAYERS: dict[str, tuple[Any, Any]] = {"tanh": (nn.Tanh, torch.tanh_), "relu": (nn.ReLU, torch.relu_)}


class MLP(nn.Module):
    """Layers with an activation between them, orthogonal to begin with (Andrychowicz et al. 2021)."""

    def __init__(self, sizes: tuple[int, ...], activation: str, gain: float) -> None:
        super().__init__()
        self.outputs = sizes[-1]
        layer, self.activation = LAYERS[activation]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            last = index == len(sizes) - 2
            linear = nn.Linear(inputs, outputs)
            nn.init.orthogonal_(linear.weight, gain if last else math.sqrt(2))
            nn.init.zeros_(linear.bias)
            layers += [linear] if last else [linear, layer()]
        self.layers = nn.Sequential(*layers)

    def forward(self, observation: Tensor) -> Tensor:
        """[..., D] to [..., outputs]."""
        # Flat once: a linear layer of more dimensions would flatten and restore its own, and its gradient too.
        rows = observation.reshape(-1, observation.shape[-1])
        return self.layers(rows).view(*observation.shape[:-1], self.outputs)

    def all_states(self, data: TensorDict) -> Tensor:
        """Outputs at s_0..s_R, [B, R + 1, outputs]."""
        return self(torch.cat([data["observation"], data["next_observation"][:, -1:]], 1))

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The function of [n, D] that this is now, for many calls on few rows.

        On 8 rows a module's call costs as much as a layer of 64, and weights the wrong way round half as much.
        """
        tensors = [(one.bias.detach(), one.weight.detach()) for one in self.layers if isinstance(one, nn.Linear)]
        weights = [(bias.clone(), weight.T.clone(memory_format=torch.contiguous_format)) for bias, weight in tensors]
        activation = self.activation

        def function(rows: Tensor) -> Tensor:
            for bias, weight in weights[:-1]:
                rows = activation(torch.addmm(bias, rows, weight))
            bias, weight = weights[-1]
            return torch.addmm(bias, rows, weight)

        return function


class ValueNetwork(MLP):
    """The value of every state; one output."""

    def values(self, batch: TensorDict) -> Tensor:
        """V(s_t) at every step, [B, R]."""
        return self(batch["observation"])[..., 0]

    def all_states(self, batch: TensorDict) -> Tensor:
        """V(s_0)..V(s_R), [B, R + 1]."""
        return super().all_states(batch)[..., 0]


class DiscreteActor(MLP):
    """Logits of a list of actions."""

    def distribution(self, batch: TensorDict) -> Categorical:
        """Distribution over actions at every step, batch shape [B, R]."""
        return Categorical(self(batch["observation"]))

    def log_policy(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of the actions by logits, but for a constant of each state. [..., A] both."""
        return outputs

    def player(self, steps: int, rows: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """A function from observations [rows, D] to actions [rows] by the weights of now, to be called `steps` times.

        The best of log π + standard Gumbel noise is distributed by π (Gumbel 1954).
        """
        noise = -torch.empty(steps, rows, self.outputs).exponential_(generator=generator).log()
        function, chance = self.frozen(), iter(noise.unbind())
        return lambda observation: (self.log_policy(function(observation)) + next(chance)).argmax(-1)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Of the actions [...] taken in states [..., D]; returns [...]."""
        return self.log_policy(self(observation)).log_softmax(-1).gather(-1, action[..., None])[..., 0]

    def greedy(self, observation: Tensor) -> Tensor:
        """The likeliest action for each row, [n]."""
        return self(observation).argmax(-1)


class ContinuousActor(nn.Module):
    """Mean and standard deviation of a Gaussian over actions, which may be squashed into bounds by tanh."""

    def __init__(self, body: MLP, log_std: float, bounds: tuple[Tensor, Tensor] | None) -> None:
        """bounds: low and high, [A] each, of squashed actions; None: a plain Gaussian."""
        super().__init__()
        self.body = body
        outputs = body.outputs
        self.log_std = nn.Parameter(torch.full((outputs,), log_std))
        self.squashed = bounds is not None
        low, high = bounds or (torch.full((outputs,), -1.0), torch.full((outputs,), 1.0))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] to mean and standard deviation, [..., A] each, before squashing."""
        loc = self.body(observation)
        return loc, self.scale().expand_as(loc)

    def all_states(self, data: TensorDict) -> Tensor:
        """Means at s_0..s_R, [B, R + 1, A]."""
        return self.body.all_states(data)

    def player(self, steps: int, rows: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """A function from observations [rows, D] to actions [rows, A] by the weights of now, for `steps` calls."""
        noise = self.scale().detach() * torch.randn(steps, rows, self.body.outputs, generator=generator)
        function, chance = self.body.frozen(), iter(noise.unbind())
        return lambda observation: self._bounded(function(observation) + next(chance))

    def scale(self) -> Tensor:
        """Standard deviations before squashing, [A]."""
        return self.log_std.clamp(LOWEST_LOG_STD, HIGHEST_LOG_STD).exp()

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Of the actions [..., A] taken in states [..., D]; returns [...]."""
        return self._distribution(observation).log_prob(action)

    def greedy(self, observation: Tensor) -> Tensor:
        """The middle of each row's actions, [n, A]."""
        return self._bounded(self.body(observation))

    def distribution(self, batch: TensorDict) -> Distribution:
        """Distribution over actions at every step, batch shape [B, R]."""
        return self._distribution(batch["observation"])

    def _distribution(self, observation: Tensor) -> Distribution:
        loc, scale = self(observation)
        if self.squashed:
            return SquashedNormal(loc, scale, low=self.get_buffer("low"), high=self.get_buffer("high"))
        return IndependentNormal(loc, scale)

    def _bounded(self, raw: Tensor) -> Tensor:
        if not self.squashed:
            return raw
        low, high = self.get_buffer("low"), self.get_buffer("high")
        # A little inside the bounds, where tanh still has an inverse in float32.
        return low + (high - low) * (raw.tanh().clamp(-1 + 1e-6, 1 - 1e-6) + 1) / 2


class SquashedNormal(TanhNormal):
    """A Gaussian through tanh; its entropy has no closed form, and TorchRL's estimate draws global random numbers."""

    def entropy(self) -> Tensor:
        """Refused."""
        raise ValueError(
            "a tanh-squashed Gaussian has no entropy in closed form; set entropy_coef to 0, or "
            "distribution to gaussian."
        )


class QNetwork(DiscreteActor):
    """The value of every action. The policy is softmax(Q / α), or at α = 0 epsilon-greedy."""

    def __init__(self, sizes: tuple[int, ...], activation: str, alpha: float) -> None:
        super().__init__(sizes, activation, gain=1.0)
        self.alpha = alpha
        self.register_buffer("epsilon", torch.zeros(()))

    def log_policy(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of the actions by their values, but for a constant of each state. [..., A] both."""
        if self.alpha > 0:
            return outputs / self.alpha
        epsilon = self.get_buffer("epsilon")
        share = torch.full_like(outputs, 1.0 / outputs.shape[-1]) * epsilon
        best = outputs.argmax(-1, keepdim=True)
        return share.scatter_add(-1, best, (1 - epsilon).expand(best.shape)).log()


class ControlNetworkFactory:
    """NetworkFactory for an environment's spaces: see `agents.interfaces.NetworkFactory`."""

    group_size = 1
    alpha = 0.0

    def __init__(self, observation: gym.Space, action: Any, config: ControlConfig, seed: int) -> None:
        """observation: a flat Box; action: Discrete, or a flat Box."""
        assert isinstance(observation, gym.spaces.Box)
        self.action, self.config = check_action_space(action, config), config
        self.discrete = isinstance(action, gym.spaces.Discrete)
        self.inputs, self.outputs = observation.shape[0], int(action.n) if self.discrete else action.shape[0]
        self.made, self.seed = 0, seed

    def actor(self) -> DiscreteActor | ContinuousActor:
        """A policy that starts close to indifferent."""
        with self._own_randomness():
            return self._discrete_actor() if self.discrete else self._continuous_actor()

    def critic(self) -> ValueNetwork:
        """Values of states."""
        with self._own_randomness():
            return ValueNetwork(self._sizes(1), self.config.activation, 1.0)

    def q_network(self, alpha: float) -> QNetwork:
        """Values of a list of actions."""
        with self._own_randomness():
            return QNetwork(self._sizes(self.outputs), self.config.activation, alpha)

    @torch.no_grad()
    def all_states(self, network: Any, data: TensorDict) -> Tensor:
        """A network's outputs at s_0..s_R, [B, R + 1, ...]."""
        return network.all_states(data)

    def _discrete_actor(self) -> DiscreteActor:
        return DiscreteActor(self._sizes(self.outputs), self.config.activation, 0.01)

    def _continuous_actor(self) -> ContinuousActor:
        body = MLP(self._sizes(self.outputs), self.config.activation, 0.01)
        squashed = self.config.distribution == "tanh"
        bounds = (torch.as_tensor(self.action.low), torch.as_tensor(self.action.high)) if squashed else None
        return ContinuousActor(body, self.config.initial_log_std, bounds)

    def _sizes(self, outputs: int) -> tuple[int, ...]:
        return (self.inputs, *self.config.hidden, outputs)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Weights come from the seed and from which network it is, and leave global randomness as it was."""
        self.made += 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + self.made)
            yield


def check_action_space(space: Any, config: ControlConfig) -> Any:
    """Refuses action spaces that no network here can give actions for."""
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        if config.distribution == "tanh" and not space.is_bounded():
            raise ValueError(
                f"tanh squashes actions into bounds, and {space} has not all; set distribution to gaussian."
            )
        return space
    raise ValueError(
        f"the learners take Discrete actions from 0 and flat Box actions, got {space}; wrap the environment so that it "
        "has one of these (gymnasium.wrappers.TransformAction)."
    )
