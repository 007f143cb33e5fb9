"""Small trainers and rollouts for the tests of agents."""

from __future__ import annotations

import torch

from agents.algorithms.ppo import PPOConfig
from agents.config import TrainConfig
from agents.networks import language_model_of
from agents.rollout import Rollout, collect
from agents.trainer import Trainer
from tests import tiny
from textenv import TextGenConfig, build_task

SMALL = dict(iterations=3, rollout=8, minibatch=4, micro_batch=4, learning_rate=1e-3, critic_learning_rate=1e-3)
# Random models rarely say the end token: a fifth of the vocabulary ends a response here, so lengths differ.
RAGGED = dict(stop_token_ids=[tiny.END, *range(60)])


def make_trainer(settings: dict, ppo: dict | None = None, **changes) -> Trainer:
    """A trainer on a tiny task."""
    task = build_task(TextGenConfig(**(RAGGED | settings)))
    config = TrainConfig(**(SMALL | changes))
    return Trainer(config, PPOConfig(**(ppo or {})), task, task.prompts)


def make_rollout(trainer: Trainer, rows: int = 8) -> Rollout:
    """A prepared rollout of ragged responses."""
    generator = torch.Generator().manual_seed(3)
    prompts = trainer.prompts.select([row % len(trainer.prompts) for row in range(rows)])
    rollout = collect(trainer.task, language_model_of(trainer.actor), prompts, generator, rows)
    trainer.algorithm.prepare(rollout.data, rows)
    return rollout


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
