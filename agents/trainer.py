"""The training loop: roll out, prepare, update. A generator of metrics; it does no input or output."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

from agents.config import TrainConfig
from agents.interfaces import Algorithm, Collector, Rollout
from agents.replay import Replay


@dataclass(frozen=True)
class Iteration:
    """The result of one pass of the loop."""

    number: int  # from 1
    metrics: dict[str, float]
    rollout: Rollout


class Trainer:
    """The loop over a collector, an algorithm and its optimizer."""

    def __init__(self, config: TrainConfig, algorithm: Algorithm, collector: Collector) -> None:
        self.config, self.algorithm, self.collector = config, algorithm, collector
        self.parameters = {name: list(network.parameters()) for name, network in algorithm.networks.trained.items()}
        self.optimizer = make_optimizer(config, self.parameters)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the minibatches' order
        self.replay = None if algorithm.on_policy else Replay(algorithm.config.buffer_size, self.device)
        self.iteration = 0  # completed
        self.steps = 0  # tokens or frames collected so far
        self.seconds = 0.0  # in the loop so far

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.algorithm.networks.policy.parameters()).device

    def iterate(self) -> Iterator[Iteration]:
        """Run the remaining iterations, up to the configured number."""
        while self.iteration < self.config.iterations:
            yield self._iterate()

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

    def _iterate(self) -> Iteration:
        started = time.perf_counter()
        rollout = self.collector.collect(self.algorithm.networks.policy)
        collected = time.perf_counter()
        steps = int(rollout.data["mask"].sum())
        metrics = rollout.metrics | self.algorithm.prepare(rollout.data)
        metrics |= self._update(self.collector.training_rows(rollout.data))
        seconds = time.perf_counter() - started
        self.iteration += 1
        self.steps += steps
        self.seconds += seconds
        self.collector.after_update(self.algorithm.networks.policy, self.iteration)
        metrics |= {
            f"{self.collector.unit}_per_second": steps / seconds,
            "seconds": seconds,
            "rollout_seconds": collected - started,
            self.collector.unit: float(self.steps),
        }
        return Iteration(self.iteration, metrics, rollout)

    def _update(self, rows: TensorDict) -> dict[str, float]:
        if self.config.schedule == "linear":
            for group in self.optimizer.param_groups:
                initial = group.setdefault("initial_lr", group["lr"])  # an optimizer set from Python has none
                group["lr"] = initial * (1 - self.iteration / self.config.iterations)
        totals: dict[str, list[float]] = defaultdict(list)
        for minibatch in self._minibatches(rows):
            metrics = self._step(minibatch)
            for name, value in metrics.items():
                totals[name].append(value)
            if self.algorithm.after_step(metrics):
                break
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def _minibatches(self, rows: TensorDict) -> Iterator[TensorDict]:
        yield from self._shuffled(rows) if self.replay is None else self._replayed(self.replay, rows)

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
                yield replay.sample(self.config.minibatch_size, self.generator)

    def _shuffled(self, rows: TensorDict) -> Iterator[TensorDict]:
        for _ in range(self.algorithm.config.epochs):
            shuffled = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]
            parts: Any = shuffled.chunk(max(1, round(len(rows) / self.config.minibatch_size)))
            yield from parts

    def _step(self, minibatch: TensorDict) -> dict[str, float]:
        """One optimizer step on the mean over a minibatch; micro-batches do not change it."""
        minibatch["weight"] = self.algorithm.step_weights(minibatch["mask"])  # [B, R]
        valid, totals = minibatch["mask"].sum(), defaultdict[str, Any](float)
        for batch in self.collector.micro_batches(minibatch):
            terms, diagnostics = self.algorithm.loss(batch)
            means = (torch.stack(list(terms.values())) * batch["weight"]).flatten(1).sum(1)
            means.sum().backward()
            for name, mean in zip(terms, means.detach(), strict=True):
                totals[name] += mean
            for name, value in diagnostics.items():
                totals[name] += value / valid
        metrics = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        for name, parameters in self.parameters.items():
            metrics[f"{name}_grad_norm"] = self._clip(name, parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics

    def _clip(self, name: str, parameters: list[nn.Parameter]) -> float:
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if not norm < float("inf"):
            raise ValueError(
                f"the {name}'s gradient norm is {norm} in iteration {self.iteration + 1}; its step was not taken, and "
                "the last checkpoint is good. Look at the rewards, or lower learning_rate."
            )
        if norm > self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, total)
        return norm


def make_optimizer(config: TrainConfig, trained: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW without weight decay; the actor has a learning rate of its own. trained: parameters by network.

    Networks with the same rate share a group: a second one costs 3 to 4% of a small network's update
    (benchmarks/LOG.md).
    """
    rates: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameters in trained.items():
        rates[config.learning_rate if name == "actor" else config.critic_learning_rate] += parameters
    groups = [{"params": parameters, "lr": rate, "initial_lr": rate} for rate, parameters in rates.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
