"""Responses coloured token by token, by what the learner makes of each: the penalty it costs, or its advantage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from agents import checkpoint
from agents.evaluation import split_prompts
from agents.networks import language_model_of
from agents.penalty import Penalty
from agents.rollout import Rollout, collect
from agents.trainer import Trainer
from textenv.generation import judge
from textenv.prompts import Prompts
from textenv.render import ansi
from textenv.state import TextState
from textenv.task import Task


def penalties(rollout: Rollout, paid: Penalty) -> Tensor:
    """β times the KL's estimate at each token, float32 [B, R]."""
    return paid.coef * rollout.data["kl"]


def advantages(rollout: Rollout, paid: Penalty) -> Tensor:
    """The advantage of each token by the run's algorithm and critic, float32 [B, R]."""
    return rollout.data["raw_advantage"][..., 0]


SHADES: dict[str, Callable[[Rollout, Penalty], Tensor]] = {"penalty": penalties, "advantage": advantages}


def shaded_responses(
    folder: Path, task: Task, prompts: Prompts, generator: torch.Generator, by: str
) -> tuple[float, list[str]]:
    """One response to each prompt by the run's last checkpoint, with its score, its tokens coloured by a shade.

    Returns the number from which colours are at their strongest, and the texts.
    """
    if by == "penalty" and task.reference is None:
        raise ValueError("the run has kl_coef=0, so its tokens cost no penalty; colour them by advantage.")
    config, algorithm_config = checkpoint.load_config(folder)
    trainer = Trainer(config, algorithm_config, task, split_prompts(task, config)[0])
    checkpoint.load_checkpoint(folder, trainer)
    paid, model = trainer.penalty(), language_model_of(trainer.actor)
    rollout = collect(trainer.task.frozen(), model, prompts, generator, len(prompts), paid)
    trainer.algorithm.prepare(rollout.data, len(prompts))
    data, values = rollout.data, SHADES[by](rollout, paid)
    state = TextState(data["input_ids"], data["attention_mask"], data["mask"].sum(1), task.config.max_prompt_tokens)
    scale = float(values.where(data["mask"], 0.0).abs().max())
    scores = judge(task.measured(), state, prompts.texts, columns=prompts.columns).score.tolist()
    texts = [ansi(state, row, task.tokenizer, values[row], scale or 1.0) for row in range(len(prompts))]
    return scale, [f"[score {score:+.2f}] {text}" for score, text in zip(scores, texts, strict=True)]
