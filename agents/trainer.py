"""The training loop: roll out, prepare, update. A generator of metrics; it does no input or output."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agents.config import TrainConfig
from agents.interfaces import Algorithm, Collector, Loss, Rollout
from agents.ranks import ALONE, Ranks, full
from agents.replay import Replay
from agents.reporting.phases import phase
from agents.seeds import torch_generator
from textenv.state import own_settings


@dataclass(frozen=True)
class Iteration:
    """The result of one pass of the loop."""

    number: int  # from 1
    metrics: dict[str, float]
    rollout: Rollout


# Called with the number of an iteration, its rollout and the policy, by all ranks, before anything is learned from it.
Watch = Callable[[int, Any, nn.Module], None]


class Trainer:
    """The loop over a collector, an algorithm and its optimizer."""

    def __init__(self, config: TrainConfig, algorithm: Algorithm, collector: Collector, ranks: Ranks = ALONE) -> None:
        self.config, self.algorithm, self.collector, self.ranks = config, algorithm, collector, ranks
        self.parameters = {name: list(network.parameters()) for name, network in algorithm.networks.trained.items()}
        self.optimizer = make_optimizer(config, self.parameters)
        self.generator = torch_generator(config.seed, "minibatches")  # of their order
        self.replay = None if algorithm.on_policy else Replay(algorithm.config.buffer_size, self.device)
        self.iteration = 0  # completed
        self.steps = 0  # tokens or frames collected so far
        self.seconds = 0.0  # in the loop so far

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.algorithm.networks.policy.parameters()).device

    def iterate(self, watch: Watch | None = None) -> Iterator[Iteration]:
        """Run the remaining iterations, up to the configured number."""
        while self.iteration < self.config.iterations:
            yield self._iterate(watch)

    def state_dict(self) -> dict[str, Any]:
        """Everything besides weights that an exact resume needs."""
        return {
            "iteration": self.iteration,
            "steps": self.steps,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "collector": self.collector.state_dict(),
            "replay": None if self.replay is None else self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.iteration, self.steps = int(state["iteration"]), int(state["steps"])
        self.seconds = float(state["seconds"])
        self.generator.set_state(state["generator"].cpu())
        self.collector.load_state_dict(state["collector"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])

    @own_settings(gradients=True)
    def _iterate(self, watch: Watch | None) -> Iteration:
        started, policy = time.perf_counter(), self.algorithm.networks.policy
        rollout = self.collector.collect(policy)
        collected = time.perf_counter()
        if watch is not None:
            watch(self.iteration + 1, rollout, policy)
        steps = int(rollout.data["mask"].sum())
        metrics = rollout.metrics | self._update(rollout.data)
        seconds = time.perf_counter() - started
        self.iteration += 1
        self.steps += steps
        self.seconds += seconds
        self.collector.after_update(policy, self.iteration)
        metrics |= {
            f"{self.collector.unit}_per_second": steps / seconds,
            "seconds": seconds,
            "rollout_seconds": collected - started,
            self.collector.unit: float(self.steps),
        }
        return Iteration(self.iteration, metrics, rollout)

    def _update(self, data: TensorDict) -> dict[str, float]:
        """Prepare a rollout, or store it for replay, and take optimizer steps. Returns the metrics' means."""
        if self.replay is None:
            with phase("prepare"):
                metrics = self.algorithm.prepare(data)
            return metrics | self._learn(self._shuffled(self.collector.training_rows(data)))
        return self._learn(self._replayed(self.replay, self.collector.replay_rows(data)))

    def _learn(self, minibatches: Iterator[TensorDict]) -> dict[str, float]:
        if self.config.schedule == "linear":
            for group in self.optimizer.param_groups:
                initial = group.setdefault("initial_lr", group["lr"])  # an optimizer set from Python has none
                group["lr"] = initial * (1 - self.iteration / self.config.iterations)
        totals: dict[str, list[float]] = defaultdict(list)
        for minibatch in minibatches:
            try:
                with phase("update"):
                    metrics = self._backward(minibatch)
                for name, value in metrics.items():
                    totals[name].append(value)
                if 0 < self.algorithm.target_kl < metrics.get("approx_kl", 0.0):
                    break
                with phase("optimizer"):
                    self._step(metrics)
            finally:  # gradients left behind would be added to those of the next step
                self.optimizer.zero_grad()
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def _replayed(self, replay: Replay, rows: TensorDict) -> Iterator[TensorDict]:
        config = self.algorithm.config
        if self.iteration == 0 and len(rows) * self.config.iterations < config.learning_starts:
            raise ValueError(
                f"nothing would be learned: {self.config.iterations} iterations of {len(rows)} rows, as in the first, "
                f"end before learning_starts={config.learning_starts} rows are there; lower learning_starts, or raise "
                "iterations."
            )
        replay.extend(rows)
        if len(replay) >= config.learning_starts:
            for _ in range(config.gradient_steps):
                # Stored as the environment gave them. Normalized when sampled, so that all rows are in today's units.
                sampled = self.collector.from_replay(replay.sample(self.config.minibatch_size, self.generator))
                self.algorithm.prepare(sampled)
                yield sampled

    def _shuffled(self, rows: TensorDict) -> Iterator[TensorDict]:
        for _ in range(self.algorithm.config.epochs):
            shuffled = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]
            parts: Any = shuffled.chunk(max(1, round(len(rows) / self.config.minibatch_size)))
            yield from parts

    def _backward(self, minibatch: TensorDict) -> dict[str, float]:
        """Gradients of the mean over a minibatch, which micro-batches do not change. Returns the metrics.

        Raises ValueError if a loss or a gradient is not finite.
        """
        minibatch["weight"] = self.algorithm.step_weights(minibatch["mask"])  # [B, R]
        valid, totals = minibatch["mask"].sum(), defaultdict[str, Any](float)
        for sums in self.ranks.each(lambda: self._add_gradients(minibatch, valid), in_step=self.collector.in_step):
            for name, value in sums.items():
                totals[name] += value.to(valid.device)
        for name, parameters in self.parameters.items():
            self.ranks.sum_gradients(parameters)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            totals[f"{name}_grad_norm"] = _total_norm(gradients)
        # All numbers at once: the host waits for the device, which it does for every number by itself as well.
        metrics = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        self._check_finite(metrics)
        return metrics

    def _add_gradients(self, minibatch: TensorDict, valid: Tensor) -> dict[str, Tensor]:
        """Add the gradients of this rank's rows. Returns what they add to the minibatch's losses and diagnostics.

        valid: steps of the whole minibatch.
        """
        sums = defaultdict[str, Any](float)
        for batch in self.collector.micro_batches(minibatch):
            for terms, diagnostics in self._losses(batch):  # of one network after another
                means = [weighted_sum(term, batch["weight"], batch["mask"]) for term in terms.values()]
                torch.autograd.backward(means)
                for name, mean in zip(terms, means, strict=True):
                    sums[name] += mean.detach()
                for name, value in diagnostics.items():
                    sums[name] += value / valid
        return sums

    def _losses(self, batch: TensorDict) -> Iterator[Loss]:
        """The algorithm's losses. Forwards alone are under autocast: its copies of weights must not outlast a step."""
        losses = self.algorithm.loss(batch)
        while True:
            with self.collector.autocast():
                terms = next(losses, None)
            if terms is None:
                return
            yield terms

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """Raise ValueError that names the losses, diagnostics and gradients that are not finite."""
        listed = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        for name, network in self.algorithm.networks.trained.items():
            if not math.isfinite(metrics[f"{name}_grad_norm"]):
                first = _first_not_finite(network)
                where = f"the first such gradient of the {name} is that of {first}"
                listed.append(
                    where if first else f"the gradients of the {name} are finite, their sum of squares is not"
                )
        if listed:
            raise ValueError(
                f"an update of iteration {self.iteration + 1} is not finite: {'; '.join(listed)}. Its step was not "
                "taken, and the last checkpoint is good. Look at the rewards, or lower learning_rate."
            )

    def _step(self, metrics: dict[str, float]) -> None:
        """Clip the gradient of each network to `max_grad_norm`, and take one optimizer step."""
        for name, parameters in self.parameters.items():
            norm = metrics[f"{name}_grad_norm"]
            if norm > self.config.max_grad_norm:
                for some in _alike(parameters):
                    nn.utils.clip_grads_with_norm_(some, self.config.max_grad_norm, torch.tensor(norm))
        self.optimizer.step()
        self.algorithm.after_step(metrics)


def weighted_sum(term: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Sum of a loss term over the steps of the mask, by weight. All [B, R]; returns a scalar.

    Steps outside the mask are left out, whatever they hold: 0 · NaN would be NaN.
    """
    return (term.where(mask, 0.0) * weight).sum()


def _first_not_finite(network: nn.Module) -> str | None:
    """The first parameter of a network with a gradient that is not finite; None where only the norm overflows."""
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and not bool(full(parameter.grad).isfinite().all()):
            return name
    return None


def _alike(tensors: Iterable[Tensor]) -> list[list[Any]]:
    """Whole tensors and sharded ones apart, which PyTorch does not mix. No list is empty."""
    kinds: dict[bool, list[Any]] = defaultdict(list)
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return list(kinds.values())


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of a network's gradient."""
    norms = [full(nn.utils.get_total_norm(some)) for some in _alike(gradients)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())


def make_optimizer(config: TrainConfig, trained: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW without weight decay; the actor has a learning rate of its own. trained: parameters by network.

    Networks with the same rate share a group: a second one costs 3 to 4% of a small network's update
    (benchmarks/LOG.md).
    """
    rates: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameters in trained.items():
        rates[config.learning_rate if name == "actor" else config.critic_learning_rate] += parameters
    groups = [
        {"params": some, "lr": rate, "initial_lr": rate}
        for rate, parameters in rates.items()
        for some in _alike(parameters)
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
