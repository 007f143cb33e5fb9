"""The protocols between the trainer, the learners and the two kinds of environments (text, control).

Shapes: B rows of R steps. In a rollout a row is a response, or a stretch of one environment's steps. `mask` says which
steps the policy took; other columns are padding, or tokens of the environment. All per-step tensors are [B, R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from tensordict import TensorDict
from torch import Tensor, nn

from agents.ranks import Ranks
from agents.reporting.plots import Panel

# Of one network: loss terms by name, [B, R] each, and diagnostics, each summed over the valid steps.
Loss = tuple[dict[str, Tensor], dict[str, Tensor]]


class Rollout(Protocol):
    """Experience gathered by one policy.

    Keys of `data`, batch size [B]: the networks' inputs; `action` [B, R] ([B, R, A] if continuous); `action_log_prob`,
    `mask`, `done`, `terminated` and `step_score` [B, R], what the task pays at each step: the score of a response (at
    its last token, unless a reward pays every token), or the reward of another environment. On text also
    `reference_log_prob` and `kl` [B, R], and β, `kl_coef` [B]. `prepare` forms the learner's `reward` from them.
    """

    @property
    def data(self) -> TensorDict:
        """The tensors to learn from."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """Statistics of the policy before its update."""
        ...


class ActionDistribution(Protocol):
    """A policy's distribution over actions at every step, such as one of `torch.distributions`."""

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Log-probability of an action at each step, [B, R]."""
        ...

    def entropy(self) -> Tensor:
        """In nats, [B, R]."""
        ...


class Actor(Protocol):
    """A policy: an `nn.Module` with these methods."""

    def distribution(self, batch: TensorDict) -> ActionDistribution:
        """Distribution over actions at every step."""
        ...

    def all_states(self, batch: TensorDict) -> Any:
        """Logits of discrete actions at s_0..s_R, for `NetworkFactory.map_states`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained weights."""
        ...


class Critic(Protocol):
    """A value function: an `nn.Module` with these methods."""

    def values(self, batch: TensorDict) -> Tensor:
        """V(s_t) at every step, [B, R]."""
        ...

    def all_states(self, batch: TensorDict) -> Tensor:
        """V(s_0)..V(s_R), [B, R + 1]."""
        ...


class NetworkFactory(Protocol):
    """Builds the networks that an algorithm asks for; every call returns a new one."""

    discrete: bool  # actions come from a finite set
    alpha: float  # weight of the entropy for maximum-entropy learners: the KL penalty's β; 0 without a penalty

    @property
    def group_size(self) -> int | None:
        """Adjacent rows that start from the same state; None where the environment has no groups."""
        ...

    def actor(self) -> Any:
        """An `Actor`."""
        ...

    def critic(self) -> Any:
        """A `Critic`."""
        ...

    def q_network(self, alpha: float) -> Any:
        """A network of action values; `all_states(batch)` returns Q(s_0, ·)..Q(s_R, ·), for `map_states`.

        It is also a policy: softmax(Q / α), or at α = 0 the greedy action with a share `epsilon` (a buffer) of random
        ones. Every call starts from different weights.
        """
        ...

    def shard(self, networks: Any) -> None:
        """Divide the weights of a learner's `Networks` among the ranks, if the settings say so."""
        ...

    def state_values(self, critic: Any, data: TensorDict) -> Tensor:
        """`critic.all_states(data)` without gradient, a few rows at a time: V(s_0)..V(s_R), [B, R + 1]."""
        ...

    def map_states(self, function: Callable[..., Tensor], values: Sequence[Any], *others: Tensor) -> Tensor:
        """`function` of what networks say of all actions at s_0..s_R, which need not be in memory at once.

        function: takes numbers [..., A] of each network, and [...] of each of `others`; returns [..., K] or [...]. It
        is called on some of the states at a time, and perhaps again for the gradients. values: what `all_states` of
        each network returned for one batch; others: [B, R], of the steps. Returns [B, R + 1, K] or [B, R + 1]; it may
        be 0 at states whose value no target reads, as those after the end of a response.
        """
        ...


class Networks(Protocol):
    """The networks of a learner."""

    policy: nn.Module  # acts in the environment
    trained: dict[str, nn.Module]  # by name; `actor` has `learning_rate`, the others `critic_learning_rate`
    targets: dict[str, nn.Module]  # copies that follow the trained networks; part of a checkpoint


class Collector(Protocol):
    """Plays the environment."""

    unit: str  # what a step is called: tokens or frames
    in_step: bool  # networks are sharded, so that all ranks do as many forwards together

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules other than the learner's whose weights a checkpoint must hold."""
        ...

    def collect(self, policy: nn.Module) -> Rollout:
        """One rollout of the policy."""
        ...

    def training_rows(self, data: TensorDict) -> TensorDict:
        """The rows that are shuffled into minibatches, from a prepared rollout."""
        ...

    def replay_rows(self, data: TensorDict) -> TensorDict:
        """The rows that are stored for replay, from a rollout: observations and scores before any normalization."""
        ...

    def from_replay(self, rows: TensorDict) -> TensorDict:
        """Stored rows with observations and scores normalized by the present statistics."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """The precision in which trained networks compute, for one forward."""
        ...

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """The parts of this rank's rows of a minibatch that go through the networks one after another.

        Parts with an empty mask may follow, whose forwards the other ranks need.
        """
        ...

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Called once after the updates of each iteration, counted from 1."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything besides weights that an exact resume needs: tensors, numbers, texts, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        ...

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Restore the part of such a state that measuring a policy needs, and no generator. On any device."""
        ...


class Algorithm(Protocol):
    """A learner: three methods, a flag, a limit, and its networks."""

    on_policy: bool  # learns from each rollout once; otherwise from a replay buffer
    ratios: bool  # divides by the probabilities under which actions were sampled
    target_kl: float  # a minibatch with an `approx_kl` above it ends the updates, without its step; 0: none does
    config: Any  # `epochs` if on policy; `buffer_size`, `learning_starts` and `gradient_steps` if not
    networks: Any  # `Networks`
    step_weights: Callable[[Tensor], Tensor]  # mask [B, R] to each step's weight in the minibatch mean, summing to 1

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        """Add what `loss` needs, such as `advantage` and `value_target`, [B, R] each. Returns metrics.

        rollout: a whole one, or rows sampled from replay.
        """
        ...

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        """Loss terms of one network after another. Terms and diagnostics of one name are added.

        The gradients of a network are taken before the next one is asked for, so that memory holds one graph.
        """
        ...

    def after_step(self, metrics: dict[str, float]) -> None:
        """Called after each optimizer step, with the metrics of its minibatch."""
        ...


class Experiment(Protocol):
    """An environment prepared for learning: who plays it, how it is measured and reported."""

    @property
    def ranks(self) -> Ranks:
        """The processes that learn together."""
        ...

    @property
    def collector(self) -> Collector:
        """Plays the environment."""
        ...

    @property
    def network_factory(self) -> NetworkFactory:
        """Builds networks for the environment's spaces."""
        ...

    def describe(self) -> str:
        """The job in a few words, printed at the start."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the models and prompts that the experiment was opened with, by what they are."""
        ...

    def save_prompts(self, folder: Path) -> None:
        """Write the evaluation's prompts to the run's folder, from where it is opened again."""
        ...

    def evaluate(self, policy: nn.Module) -> Any:
        """Measure a policy; the same episodes for every policy."""
        ...

    def summarize(self, evaluation: Any) -> dict[str, float]:
        """Means of an evaluation, by name."""
        ...

    def objective(self, evaluation: Any) -> float:
        """What the learner is to raise, as measured by an evaluation."""
        ...

    def report_metrics(self, rollout: Any) -> dict[str, float]:
        """Metrics of a rollout for the report alone, such as a gold score; no learner sees them."""
        ...

    def dump_rows(self, rollout: Any) -> Iterator[dict[str, Any]]:
        """A rollout after `prepare` and `report_metrics` as rows of numbers and texts, and lists of them."""
        ...

    def watch(self, number: int, rollout: Any, policy: nn.Module) -> None:
        """Note what only the policy that played the rollout of iteration `number` knows. Called before its update."""
        ...

    def records(self, number: int, rollout: Any) -> list[dict[str, Any]]:
        """A few rows of the rollout of iteration `number` step by step, as JSON, to be looked at; usually none.

        Called after the update, on the first rank.
        """
        ...

    def held_out_records(self, trainer: Any, evaluation: Any) -> list[dict[str, Any]]:
        """A few episodes of an evaluation step by step, with the learner's numbers. Called on every rank."""
        ...

    def progress_line(self, metrics: dict[str, float]) -> str:
        """An iteration in a few words, for the progress bar."""
        ...

    def remarks(self, number: int, metrics: dict[str, float]) -> list[str]:
        """What a user should know of iteration `number`, as lines for the terminal; usually none."""
        ...

    def write_results(
        self, folder: Path, trainer: Any, evaluations: tuple[Any, Any], records: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write the policy, pictures and tables to the run's folder; returns entries for the summary.

        evaluations: before and after training. records: of held-out episodes after training. Called on every rank;
        the first one writes.
        """
        ...

    def sample_rows(self, before: Any, after: Any) -> list[dict[str, Any]]:
        """A table of some episodes before and after training, for trackers."""
        ...

    def panels(self) -> Sequence[Panel]:
        """The panels of the learning curves."""
        ...

    def result_lines(self, summary: dict[str, Any], folder: Path) -> list[str]:
        """The result in a few lines, for the terminal."""
        ...
