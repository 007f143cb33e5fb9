"""Actors, critics and Q-networks on vector observations: small MLPs that share no weights.

All read `observation` [B, R, D]. `all_states` also reads the last `next_observation`: a row holds consecutive steps
of one environment, so s_1..s_{R-1} are among the observations already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from agents.objectives.actor_critic import Categorical
from agents.seeds import initial_weights, seed_of
from textenv.state import own_settings

# By activation: the module, and the in-place function.
LAYERS: dict[str, tuple[Any, Any]] = {"tanh": (nn.Tanh, torch.tanh_), "relu": (nn.ReLU, torch.relu_)}


class MLP(nn.Module):
    """Multilayer perceptron with orthogonal initialization (Andrychowicz et al. 2021)."""

    def __init__(self, sizes: tuple[int, ...], activation: str, gain: float) -> None:
        super().__init__()
        self.sizes, self.outputs, self.activation_name = sizes, sizes[-1], activation
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
        # Flatten once: each linear layer would flatten and restore its own input and gradient.
        rows = observation.reshape(-1, observation.shape[-1])
        return self.layers(rows).view(*observation.shape[:-1], self.outputs)

    def all_states(self, data: TensorDict) -> Tensor:
        """Outputs at s_0..s_R, [B, R + 1, outputs]."""
        return self(torch.cat([data["observation"], data["next_observation"][:, -1:]], 1))

    def snapshot(self) -> Callable[[Tensor], Tensor]:
        """A function of [n, D] with a copy of the current weights, fast for many calls on few rows.

        On 8 rows, the overhead of a module call costs as much as a layer of 64, and untransposed weights half as much.
        """
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        tensors = [(layer.bias.detach(), layer.weight.detach()) for layer in linears]
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
    """Logits of discrete actions."""

    def distribution(self, batch: TensorDict) -> Categorical:
        """Distribution over actions at every step, batch shape [B, R]."""
        return Categorical(self(batch["observation"]))

    def log_policy(self, outputs: Tensor) -> Tensor:
        """Log-probabilities up to a constant per state, from logits. [..., A] to [..., A]."""
        return outputs

    def action_sampler(self, steps: int, rows: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """A function from observations [rows, D] to sampled actions [rows] by the current weights, for `steps` calls.

        The argmax of log π plus standard Gumbel noise is a sample from π (Gumbel 1954).
        """
        noise = -torch.empty(steps, rows, self.outputs).exponential_(generator=generator).log()
        network, noises = self.snapshot(), iter(noise.unbind())
        return lambda observation: (self.log_policy(network(observation)) + next(noises)).argmax(-1)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log-probabilities [...] of actions [...] in states [..., D]."""
        return self.log_policy(self(observation)).log_softmax(-1).gather(-1, action[..., None])[..., 0]

    def greedy(self, observation: Tensor) -> Tensor:
        """The likeliest action of each row, [n]."""
        return self(observation).argmax(-1)


class ContinuousActor(nn.Module):
    """A Gaussian policy over continuous actions, optionally squashed into bounds by tanh."""

    def __init__(self, body: MLP, log_std: float, bounds: tuple[Tensor, Tensor] | None) -> None:
        """bounds: low and high of squashed actions, [A] each; None for a plain Gaussian."""
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

    def action_sampler(self, steps: int, rows: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Like `DiscreteActor.action_sampler`; actions are [rows, A]."""
        noise = self.scale().detach() * torch.randn(steps, rows, self.body.outputs, generator=generator)
        network, noises = self.body.snapshot(), iter(noise.unbind())
        return lambda observation: self._bounded(network(observation) + next(noises))

    def scale(self) -> Tensor:
        """Standard deviations before squashing, [A]."""
        return self.log_std.clamp(LOWEST_LOG_STD, HIGHEST_LOG_STD).exp()

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log-probabilities [...] of actions [..., A] in states [..., D]."""
        return self._distribution(observation).log_prob(action)

    def greedy(self, observation: Tensor) -> Tensor:
        """The mean before squashing, mapped into the bounds, [n, A]."""
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
        # Slightly inside the bounds, where tanh can be inverted in float32.
        return low + (high - low) * (raw.tanh().clamp(-1 + 1e-6, 1 - 1e-6) + 1) / 2


class SquashedNormal(TanhNormal):
    """A tanh-squashed Gaussian that refuses `entropy`: TorchRL's estimate would use the global random generator."""

    def entropy(self) -> Tensor:
        """Raises ValueError: there is no closed form."""
        raise ValueError(
            "a tanh-squashed Gaussian has no entropy in closed form; set entropy_coef to 0, or "
            "distribution to gaussian."
        )


class QNetwork(DiscreteActor):
    """Action values [..., A]. Its policy is softmax(Q / α), or ε-greedy at α = 0."""

    def __init__(self, sizes: tuple[int, ...], activation: str, alpha: float) -> None:
        super().__init__(sizes, activation, gain=1.0)
        self.alpha = alpha
        self.register_buffer("epsilon", torch.zeros(()))

    def log_policy(self, outputs: Tensor) -> Tensor:
        """Log-probabilities up to a constant per state, from action values. [..., A] to [..., A]."""
        if self.alpha > 0:
            return outputs / self.alpha
        epsilon = self.get_buffer("epsilon")
        share = torch.full_like(outputs, 1.0 / outputs.shape[-1]) * epsilon
        best = outputs.argmax(-1, keepdim=True)
        return share.scatter_add(-1, best, (1 - epsilon).expand(best.shape)).log()


class ControlNetworkFactory:
    """NetworkFactory for an environment's spaces: see `agents.interfaces.NetworkFactory`."""

    group_size: int | None = None  # episodes cannot be started from the same state
    alpha = 0.0

    def __init__(self, observation: gym.Space, action: Any, config: ControlConfig, seed: int) -> None:
        """observation: a flat Box; action: Discrete, or a flat Box."""
        assert isinstance(observation, gym.spaces.Box)
        self.action, self.config = check_action_space(action, config), config
        self.discrete = isinstance(action, gym.spaces.Discrete)
        self.inputs, self.outputs = observation.shape[0], int(action.n) if self.discrete else action.shape[0]
        self.made, self.seed = 0, seed

    def actor(self) -> DiscreteActor | ContinuousActor:
        """A policy that starts near uniform."""
        with self._own_randomness():
            return self._discrete_actor() if self.discrete else self._continuous_actor()

    def critic(self) -> ValueNetwork:
        """A network of state values."""
        with self._own_randomness():
            return ValueNetwork(self._sizes(1), self.config.activation, 1.0)

    def q_network(self, alpha: float) -> QNetwork:
        """A network of action values."""
        with self._own_randomness():
            return QNetwork(self._sizes(self.outputs), self.config.activation, alpha)

    def shard(self, networks: Any) -> None:
        """Nothing: these networks are small."""

    @own_settings()
    def state_values(self, critic: ValueNetwork, data: TensorDict) -> Tensor:
        """V(s_0)..V(s_R) without gradient, [B, R + 1]."""
        return critic.all_states(data)

    def map_states(self, function: Callable[..., Tensor], values: Sequence[Tensor], *others: Tensor) -> Tensor:
        """`function` of all outputs at once; of s_R, which no step leaves, it gets 0 for the numbers of a step."""
        return function(*values, *(torch.cat([other, torch.zeros_like(other[:, :1])], 1) for other in others))

    def _discrete_actor(self) -> DiscreteActor:
        return DiscreteActor(self._sizes(self.outputs), self.config.activation, 0.01)

    def _continuous_actor(self) -> ContinuousActor:
        body = self._mlp(self.outputs, 0.01)
        squashed = self.config.distribution == "tanh"
        bounds = (torch.as_tensor(self.action.low), torch.as_tensor(self.action.high)) if squashed else None
        return ContinuousActor(body, self.config.initial_log_std, bounds)

    def _mlp(self, outputs: int, gain: float) -> MLP:
        return MLP(self._sizes(outputs), self.config.activation, gain)

    def _sizes(self, outputs: int) -> tuple[int, ...]:
        return (self.inputs, *self.config.hidden, outputs)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Initial weights depend on the seed and on how many networks came before; global randomness is unchanged."""
        self.made += 1
        with own_settings(gradients=True), initial_weights(seed_of(self.seed, "networks", self.made)):
            yield


def check_observation_space(env: str, space: gym.Space) -> None:
    """Raise ValueError for observations that these networks do not take: those without a fixed width, and images."""
    if not space.is_np_flattenable:
        raise ValueError(
            f"the learners read vectors of one width, and the observations of {env!r}, {space}, have none; wrap the "
            "environment, for instance in gymnasium.wrappers.TransformObservation with a Box."
        )
    images = [part for part in _boxes(space) if len(part.shape) == 3 or (len(part.shape) == 2 and part.dtype == "u1")]
    if images:
        raise ValueError(
            f"the observations of {env!r} hold images, {images[0]}, and the networks here are small MLPs on vectors, "
            "which learn little from pixels; extract features in a wrapper of the environment, or state that flat "
            "pixels are meant by gymnasium.wrappers.FlattenObservation."
        )


def _boxes(space: gym.Space) -> list[gym.spaces.Box]:
    """All boxes in a space of Dicts and Tuples."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = space.values() if isinstance(space, gym.spaces.Dict) else space
        return [box for part in parts for box in _boxes(part)]
    return [space] if isinstance(space, gym.spaces.Box) else []


def check_action_space(space: Any, config: ControlConfig) -> Any:
    """Raise ValueError for action spaces that these networks do not support; returns the space."""
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        if config.distribution == "tanh" and not space.is_bounded():
            raise ValueError(
                f"tanh squashes actions into bounds, but {space} is not bounded; set distribution to gaussian."
            )
        return space
    raise ValueError(
        f"the learners support Discrete actions that start at 0 and flat Box actions, got {space}; wrap the "
        "environment, for instance in gymnasium.wrappers.TransformAction."
    )
