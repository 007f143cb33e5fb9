"""Small trainers and rollouts for the tests of agents."""

from __future__ import annotations

import dataclasses

import torch

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.text.config import TextConfig
from agents.text.networks import TextNetworkFactory
from agents.text.rollout import TextCollector, TextRollout, collect
from agents.trainer import Trainer, weighted_sums
from tests.support import tiny
from textenv import TextGenConfig, build_task

SMALL = dict(
    iterations=3, rollout_size=8, minibatch_size=4, micro_batch_size=4, learning_rate=1e-3, critic_learning_rate=1e-3
)
# Random models rarely say the end token: a fifth of the vocabulary ends a response here, so lengths differ.
RAGGED = dict(stop_token_ids=[tiny.END, *range(60)])
SHARED = {field.name for field in dataclasses.fields(TrainConfig)}


def make_trainer(settings: dict, algorithm: dict | None = None, learner: str = "ppo", **changes) -> Trainer:
    """A trainer on a tiny task; `learner` names the algorithm, and `algorithm` holds its own settings."""
    task = build_task(TextGenConfig(**(RAGGED | settings)))
    given = SMALL | changes
    config = TrainConfig(algorithm=learner, **{name: value for name, value in given.items() if name in SHARED})
    text = TextConfig(**{name: value for name, value in given.items() if name not in SHARED})
    settings_class, algorithm_class = find_algorithm(learner)
    networks = TextNetworkFactory(task, text.critic, text.micro_batch_size, config.seed, text.lora_rank)
    collector = TextCollector(task, task.prompts, text, config.seed)
    return Trainer(config, algorithm_class(settings_class(**(algorithm or {})), networks), collector)


def make_rollout(trainer: Trainer, rows: int = 8) -> TextRollout:
    """A prepared rollout of ragged responses."""
    collector, generator = trainer.collector, torch.Generator().manual_seed(3)
    prompts = collector.prompts.select([row % len(collector.prompts) for row in range(rows)])
    rollout = collect(collector.task, trainer.algorithm.networks.policy.model, prompts, generator, rows)
    trainer.algorithm.prepare(rollout.data)
    return rollout


def losses(trainer: Trainer, batch) -> dict[str, torch.Tensor]:
    """Every loss term's mean over a batch, as the trainer takes it."""
    terms, weight = trainer.algorithm.loss(batch)[0], trainer.algorithm.step_weights(batch["mask"])
    return dict(zip(terms, weighted_sums(torch.stack(list(terms.values())), weight, batch["mask"]), strict=True))


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
