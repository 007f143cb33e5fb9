"""Small trainers and rollouts for the tests of agents."""

from __future__ import annotations

import dataclasses

import torch

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.interfaces import Loss
from agents.ranks import ALONE, Ranks, full
from agents.text.collector import TextCollector
from agents.text.config import FULL, TextConfig
from agents.text.networks import TextNetworkFactory
from agents.text.rollout import TextRollout, collect
from agents.text.sharding import shard_task
from agents.trainer import Trainer, weighted_sum
from tests.support import tiny
from textenv import TextGenConfig, build_task

SMALL = dict(
    iterations=3, rollout_size=8, minibatch_size=4, micro_batch_tokens=80, learning_rate=1e-3, critic_learning_rate=1e-3
)
# Random models rarely say the end token: a fifth of the vocabulary ends a response here, so lengths differ.
RAGGED = dict(stop_token_ids=[tiny.END, *range(60)])
SHARED = {field.name for field in dataclasses.fields(TrainConfig)}


def make_trainer(
    settings: dict, algorithm: dict | None = None, learner: str = "ppo", ranks: Ranks = ALONE, **changes
) -> Trainer:
    """A trainer on a tiny task; `learner` names the algorithm, and `algorithm` holds its own settings."""
    task = build_task(TextGenConfig(**(RAGGED | settings)))
    given = SMALL | changes
    config = TrainConfig(algorithm=learner, **{name: value for name, value in given.items() if name in SHARED})
    text = TextConfig(**{name: value for name, value in given.items() if name not in SHARED})
    settings_class, algorithm_class = find_algorithm(learner)
    if text.shard == FULL:
        task = shard_task(task, ranks.mesh(task.device))
    networks = TextNetworkFactory(task, text, config.seed, ranks)
    collector = TextCollector(task, task.prompts, text, config.seed, ranks=ranks)
    made = algorithm_class(settings_class(**(algorithm or {})), networks)
    networks.shard(made.networks)
    return Trainer(config, made, collector, ranks)


def make_rollout(trainer: Trainer, rows: int = 8) -> TextRollout:
    """A prepared rollout of ragged responses."""
    collector, generator = trainer.collector, torch.Generator().manual_seed(3)
    prompts = collector.prompts.select([row % len(collector.prompts) for row in range(rows)])
    rollout = collect(collector.task, trainer.algorithm.networks.policy.model, prompts, generator, 1000)
    trainer.algorithm.prepare(rollout.data)
    return rollout


def losses(trainer: Trainer, batch) -> dict[str, torch.Tensor]:
    """Every loss term's mean over a batch, as the trainer takes it."""
    terms, weight = loss(trainer.algorithm, batch)[0], trainer.algorithm.step_weights(batch["mask"])
    return {name: weighted_sum(term, weight, batch["mask"]) for name, term in terms.items()}


def whole(network, batch) -> torch.Tensor:
    """Logits or action values of all tokens at all steps, [B, R, V]."""
    return network.all_states(batch).map(lambda values: values)


def loss(algorithm, batch) -> Loss:
    """Loss terms [B, R] and diagnostics of all networks together; those of one name are added."""
    together: Loss = ({}, {})
    for parts in algorithm.loss(batch):
        for total, part in zip(together, parts, strict=True):
            total |= {name: total.get(name, 0) + value for name, value in part.items()}
    return together


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [full(parameter.detach()).clone() for parameter in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
