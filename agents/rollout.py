"""Whole responses as TensorDicts: sampled by the actor on the fast path, judged by the environment.

Keys of a rollout, batch size [B]: `input_ids` and `attention_mask` [B, L]; `action`, `action_log_prob`, `mask`,
`reference_log_prob`, `kl` and `reward` [B, R] (the environment's reward and the shaped one, `shaped_reward`, which
is less β times `kl`); `score` [B]; with action masks also `allowed_ids` [B, R, K] and `allowed_inside` [B, R], the two
halves of a `TokenSets`. Everything is zero outside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

from agents.penalty import Penalty, estimate_kl
from textenv.generation import Judgement, generate, judge
from textenv.kl import shaped_reward
from textenv.prompts import Prompts
from textenv.sampling import Sampling
from textenv.task import Task


@dataclass(frozen=True)
class Rollout:
    """A batch of responses: tensors to learn from, and what people read."""

    data: TensorDict
    prompts: tuple[str, ...]
    judgement: Judgement


def collect(
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    generator: torch.Generator,
    rows_per_pass: int,
    penalty: Penalty | None = None,
) -> Rollout:
    """One response to each prompt, as the learner sees it; `penalty` defaults to the environment's own β and k1."""
    penalty = penalty or Penalty(coef=task.config.kl_coef)
    sampling = Sampling(temperature=task.config.temperature)
    generation = generate(task, model, prompts, sampling, generator)
    state = generation.state
    judgement = judge(task, state, prompts.texts, rows_per_pass, prompts.columns)
    mask = state.response_mask
    kl = estimate_kl(task, model, generation, judgement.reference_log_prob, penalty.estimator, rows_per_pass)
    shaped = shaped_reward(judgement.reward, judgement.reference_log_prob, task.config.kl_coef, penalty.coef * kl)
    data = TensorDict(
        {
            "input_ids": state.input_ids,
            "attention_mask": state.attention_mask,
            "action": state.response_ids.where(mask, 0),
            "action_log_prob": generation.log_prob,
            "mask": mask,
            "reference_log_prob": judgement.reference_log_prob,
            "kl": kl,
            "reward": judgement.reward,
            "shaped_reward": shaped,
            "score": judgement.score,
        },
        batch_size=[len(prompts)],
        device=task.device,
    )
    if generation.allowed is not None:
        data["allowed_ids"], data["allowed_inside"] = generation.allowed.ids, generation.allowed.inside
    return Rollout(data, prompts.texts, judgement)


def trim(batch: TensorDict) -> TensorDict:
    """The same texts without the columns that are padding in every row."""
    mask, attention = batch["mask"], batch["attention_mask"]
    total, budget = mask.shape[1], attention.shape[1]
    used = max(int(torch.any(mask, 0).sum()), 1)  # response columns, filled from the left
    first = int(torch.any(attention, 0).long().argmax())  # prompt columns, filled from the right
    trimmed = {}
    for key, value in batch.items():
        if value.ndim > 1 and value.shape[1] == budget:
            value = value[:, first : budget - total + used]
        elif value.ndim > 1 and value.shape[1] == total:
            value = value[:, :used]
        trimmed[key] = value
    return TensorDict(trimmed, batch_size=batch.batch_size, device=batch.device)
