"""What the trainer, the algorithms and the two kinds of environments ask of each other.

Shapes everywhere: B rows of R steps. A row is a response, or a stretch of steps in another environment; after
`Collector.rows` it is whatever is shuffled into minibatches. `mask` says which steps are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn

from agents.reporting.plots import Panel


class Rollout(Protocol):
    """Experience that one policy has gathered.

    Keys of `data`, batch size [B]: what the networks read; `action` [B, R] (or [B, R, A], continuous);
    `action_log_prob`, `mask`, `done`, `terminated` [B, R]; `reward` [B, R], what the environment paid, and
    `shaped_reward` [B, R], less the penalty, where there is one; `task_reward` [B, R], with no part of a penalty. Where
    there is a penalty also `reference_log_prob` [B, R] and its weight β, `kl_coef` [B].
    """

    @property
    def data(self) -> TensorDict:
        """What is learned from."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """What it shows of the policy before it is updated."""
        ...


class NetworkFactory(Protocol):
    """Makes the networks that an algorithm asks for, new at every call."""

    discrete: bool  # whether an action is one of a list
    group: int  # neighboring rows that start from the same state; 1 where there are no groups
    temperature: float  # β of the penalty, which a maximum-entropy learner takes for its temperature; 0 without

    def actor(self) -> ProbabilisticTensorDictSequential:
        """The policy, with the log-probability of actions."""
        ...

    def critic(self) -> TensorDictModule:
        """`state_value` [B, R, 1] of every state."""
        ...

    def q_network(self, temperature: float) -> TensorDictModule:
        """`action_value` [B, R, A] of every action, for a policy softmax(Q / temperature).

        The network inside plays that policy; at temperature 0 the best action, but for a share `epsilon` of random
        ones, a buffer of its own. Its `all_states(batch)` are the values [B, R + 1, A] at s_0..s_R, with gradient, and
        an actor's network of discrete actions has the same for its logits. No two start alike.
        """
        ...

    def all_states(self, network: nn.Module, data: TensorDict) -> Tensor:
        """A network's outputs [B, R + 1, ...] at s_0..s_R, without gradient and some rows at a time."""
        ...


class Collector(Protocol):
    """Plays an environment."""

    unit: str  # what is counted: tokens or frames

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Weights of its own that a checkpoint must hold."""
        ...

    def collect(self, policy: nn.Module) -> Rollout:
        """Goes on playing for one rollout."""
        ...

    def rows(self, data: TensorDict) -> TensorDict:
        """The rows that are shuffled into minibatches, from a rollout that is prepared."""
        ...

    def split(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """The parts of a minibatch that are read at a time."""
        ...

    def learned(self, policy: nn.Module, iteration: int) -> None:
        """The policy was updated for the `iteration`th time."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is not a weight and is needed to go on as if never stopped."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


class Algorithm(Protocol):
    """What the trainer asks of a learner: three verbs and a flag, and its networks."""

    on_policy: bool  # learns from each rollout and forgets it; else from a replay buffer
    config: (
        Any  # has `epochs`, passes over each rollout; off policy `buffer_size`, `gradient_steps` and `learning_starts`
    )
    policy: nn.Module  # what plays
    trained: dict[str, nn.Module]  # `actor` has `learning_rate`, the others `critic_learning_rate`
    targets: dict[str, nn.Module]  # follow the trained ones; kept in checkpoints

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Adds what `loss` reads, `advantage` and `value_target` say; returns metrics."""
        ...

    def weights(self, mask: Tensor) -> Tensor:
        """How much every step counts in the mean over a minibatch: [B, R], summing to 1."""
        ...

    def loss(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms of every step, [B, R] each, and diagnostics, each a sum over the valid steps."""
        ...

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Target networks, temperature, or nothing. True: enough has been learned from this rollout."""
        ...


class Experiment(Protocol):
    """An environment opened for learning: what plays it, what reads it, how it is measured and reported."""

    @property
    def collector(self) -> Collector:
        """What plays it."""
        ...

    @property
    def networks(self) -> NetworkFactory:
        """What makes networks for it."""
        ...

    def describe(self) -> str:
        """What is about to happen, in a few words."""
        ...

    def evaluate(self, policy: nn.Module) -> Any:
        """Measures a policy, always by the same episodes."""
        ...

    def numbers(self, evaluation: Any) -> dict[str, float]:
        """What `evaluate` found, for people and JSON."""
        ...

    def headline(self, metrics: dict[str, float]) -> str:
        """An iteration in a few words, for the progress bar."""
        ...

    def write_results(self, folder: Path, trainer: Any, before: Any, after: Any) -> dict[str, Any]:
        """The policy, pictures and tables, into the run's folder; returns the summary's own part."""
        ...

    def panels(self) -> Sequence[Panel]:
        """What the learning curves show."""
        ...

    def show(self, summary: dict[str, Any], folder: Path) -> list[str]:
        """The result in a few lines, for the terminal."""
        ...
