"""Whole responses as TensorDicts: sampled by the actor on the fast path, judged by the environment.

Keys of a rollout, batch size [B]: `input_ids` and `attention_mask` [B, L]; `action`, `action_log_prob`, `mask`,
`done`, `terminated`, `reference_log_prob`, `kl` and three rewards [B, R]: the environment's `reward`, `task_reward`,
which is the score alone, and `shaped_reward`, which is that less β times `kl`; `score` and β, `kl_coef`, [B]; with
action masks also `allowed_ids` [B, R, K] and `allowed_inside` [B, R], the two halves of a `TokenSets`. Everything is
zero outside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel

from agents.advantages import masked_mean, response_ends
from agents.text.penalty import Penalty, estimate_kl
from textenv.generation import Judgement, generate, judge
from textenv.kl import shaped_reward
from textenv.prompts import Prompts
from textenv.sampling import Sampling
from textenv.task import Task


@dataclass(frozen=True)
class TextRollout:
    """A batch of responses: tensors to learn from, what they show, and what people read."""

    data: TensorDict
    metrics: dict[str, float]
    prompts: tuple[str, ...]
    judgement: Judgement


def collect(
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    generator: torch.Generator,
    rows_per_pass: int,
    penalty: Penalty | None = None,
) -> TextRollout:
    """One response to each prompt, as the learner sees it; `penalty` defaults to the environment's own β and k1."""
    penalty = penalty or Penalty(coef=task.config.kl_coef)
    sampling = Sampling(temperature=task.config.temperature)
    generation = generate(task, model, prompts, sampling, generator)
    state = generation.state
    judgement = judge(task, state, prompts.texts, rows_per_pass, prompts.columns)
    mask = state.response_mask
    kl = estimate_kl(task, model, generation, judgement.reference_log_prob, penalty.estimator, rows_per_pass)
    paid = (judgement.reward, judgement.reference_log_prob, task.config.kl_coef)
    ends = response_ends(mask)
    data = TensorDict(
        {
            "input_ids": state.input_ids,
            "attention_mask": state.attention_mask,
            "action": state.response_ids.where(mask, 0),
            "action_log_prob": generation.log_prob,
            "mask": mask,
            "done": ends.done,
            "terminated": ends.terminated,
            "reference_log_prob": judgement.reference_log_prob,
            "kl": kl,
            "reward": judgement.reward,
            "task_reward": shaped_reward(*paid, torch.zeros_like(kl)),
            "shaped_reward": shaped_reward(*paid, penalty.coef * kl),
            "score": judgement.score,
            "kl_coef": torch.full_like(judgement.score, penalty.coef),
        },
        batch_size=[len(prompts)],
        device=task.device,
    )
    if generation.allowed is not None:
        data["allowed_ids"], data["allowed_inside"] = generation.allowed.ids, generation.allowed.inside
    metrics = rollout_metrics(data) | part_metrics(judgement.score_parts)
    if task.reference is not None:
        metrics |= kl_metrics(data) | {"kl_coef": penalty.coef}
    return TextRollout(data, metrics, prompts.texts, judgement)


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


def rollout_metrics(data: TensorDict) -> dict[str, float]:
    """What the sampled responses show of the policy, before it is updated.

    Entropy is the mean of −log π over the sampled tokens, in nats a token.
    """
    mask = data["mask"]
    return {
        "score": float(data["score"].mean()),
        "score_std": float(data["score"].std(correction=0)),
        "shaped_return": float(data["shaped_reward"].sum(1).mean()),
        "entropy": float(-masked_mean(data["action_log_prob"], mask)),
        "length": float(mask.sum(1).float().mean()),
    }


def part_metrics(parts: dict[str, Tensor]) -> dict[str, float]:
    """The mean of what each reward gave, as `score/NAME`; nothing where there is one, which the score shows already.

    parts: float32 [B] each.
    """
    return {f"score/{name}": float(part.mean()) for name, part in parts.items()} if len(parts) > 1 else {}


def kl_metrics(data: TensorDict) -> dict[str, float]:
    """KL of the policy to the reference in nats, by the k1 estimator whatever the penalty is made of."""
    log_ratio = (data["action_log_prob"] - data["reference_log_prob"]).where(data["mask"], 0.0)  # [B, R]
    return {
        "kl_per_response": float(log_ratio.sum(1).mean()),
        "kl_per_token": float(log_ratio.sum() / data["mask"].sum()),
    }
