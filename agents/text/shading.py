"""Responses with every token colored by its KL penalty or its advantage."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.interfaces import Algorithm
from agents.text.collector import TextCollector
from agents.text.networks import language_model_of
from agents.text.rollout import collect
from textenv.generation import score_responses
from textenv.prompts.tokenized import Prompts
from textenv.rendering.text import ansi
from textenv.state import TextState


def shaded_responses(
    algorithm: Algorithm, collector: TextCollector, prompts: Prompts, generator: torch.Generator, by: str
) -> tuple[float, list[str]]:
    """Sample one response per prompt from a learner's policy and color its tokens.

    by: `penalty` or `advantage`. Returns the value of full color, and one text per prompt that starts with the score.
    Raises ValueError if the run has no penalty, or its algorithm no advantage per token.
    """
    task, penalty = collector.task, collector.penalty()
    if by == "penalty" and task.reference is None:
        raise ValueError("the run has kl_coef=0, so tokens have no penalty; color them by advantage.")
    model, tokens = language_model_of(algorithm.networks.policy), collector.config.micro_batch_tokens
    rollout = collect(task.with_frozen_statistics(), model, prompts, generator, tokens, penalty)
    data = rollout.data
    values = penalty.coef * data["kl"] if by == "penalty" else _advantages(algorithm, data)
    state = TextState.from_masks(data["input_ids"], data["attention_mask"], data["mask"])
    scale = float(values.where(data["mask"], 0.0).abs().max())
    scores = score_responses(task.without_normalization(), state, prompts.texts, fields=prompts.fields).score.tolist()
    texts = [ansi(state, row, task.tokenizer, values[row], scale or 1.0) for row in range(len(prompts))]
    return scale, [f"[score {score:+.2f}] {text}" for score, text in zip(scores, texts, strict=True)]


def _advantages(algorithm: Algorithm, data: TensorDict) -> Tensor:
    algorithm.prepare(data)
    raw = data.get("raw_advantage", None)
    if raw is None:
        raise ValueError("this run's algorithm computes no advantage per token; color them by penalty.")
    return raw
