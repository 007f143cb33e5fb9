"""Rollouts of whole responses as TensorDicts: sampled by the actor on the fast path, scored by the environment.

Keys of a rollout, batch size [B]: `input_ids` and `attention_mask` [B, L]; `action`, `action_log_prob`, `mask`, `done`,
`terminated`, `step_score`, `reference_log_prob` and `kl`, an estimate of the KL, [B, R]; the response's `score` and β,
`kl_coef`, [B]; with normalized scores also `raw_final_score` [B], what the last token paid before normalization, and
`token_score` [B, R], what is not normalized; with action masks also `allowed_ids` [B, R, K] and `allowed_inside`
[B, R], the two halves of a `TokenSets`. Per-step numbers are zero outside the mask.

Several ranks write a rollout together: each its own rows, which all of them then have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.objectives.advantages import masked_mean, response_ends
from agents.ranks import ALONE, Ranks
from agents.reporting.phases import phase
from agents.text.sharding import whole
from textenv.generation import (
    Generation,
    Readings,
    ScoredResponses,
    generate,
    pay,
    random_numbers,
    read_responses,
    response_kl,
)
from textenv.kl import ESTIMATORS, EXACT, penalized_reward
from textenv.masks.token_sets import TokenSets
from textenv.models.decoding import Decoding
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import Prompts
from textenv.rewards.base import ResponseBatch, Scores
from textenv.rewards.reward_model import reward_models
from textenv.state import STOP, TextState, own_settings
from textenv.task import Task

# What a row of `TextRollout.rows` holds for each token, and for the response.
PER_TOKEN = (
    *("mask", "action_log_prob", "reference_log_prob", "kl", "step_score", "reward"),
    *("state_value", "td_error", "raw_advantage", "advantage", "value_target"),
)
PER_RESPONSE = ("score", "gold", "kl_coef")


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The penalty of a rollout at every token: β times an estimate of the KL."""

    coef: float  # β
    estimator: str = "k1"  # k1, k2, k3 or exact


@dataclass(frozen=True)
class TextRollout:
    """A batch of responses: tensors to learn from, their statistics, prompts, and the environment's scores."""

    data: TensorDict
    metrics: dict[str, float]
    prompts: tuple[str, ...]
    scored: ScoredResponses

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each response as texts, numbers and lists of numbers, of all its tokens.

        `prompt` and `response` are texts, `prompt_ids` and `response_ids` their tokens; `mask` says which tokens of the
        response the policy wrote, and the other lists are the keys of `data`, as far as they are there, one number for
        each token. `fields` holds the prompt's own.
        """
        data, fields = self.data.cpu(), self.scored.batch.fields
        responses, width = self.scored.responses, data["mask"].shape[1]
        for index, prompt in enumerate(self.prompts):
            row, attended = data[index], data["attention_mask"][index].bool()
            inside = attended[-width:]  # [R], tokens of the response
            before, written = row["input_ids"].split([len(attended) - width, width])
            yield {
                "prompt": prompt,
                "response": responses[index],
                "finish_reason": self.scored.finish_reason(index),
                "prompt_ids": before[attended[:-width]].tolist(),
                "response_ids": written[inside].tolist(),
                **{name: row[name][inside].tolist() for name in PER_TOKEN if name in row},
                **{name: row[name].item() for name in PER_RESPONSE if name in row},
                "fields": {name: values[index] for name, values in fields.items()},
            }


@own_settings()
def collect(
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    chance: torch.Generator | Tensor,
    tokens_per_pass: int | None,
    penalty: Penalty | None = None,
    decoding: Decoding | None = None,
    ranks: Ranks = ALONE,
) -> TextRollout:
    """One response to each prompt; `penalty` defaults to the environment's β with k1.

    chance: a generator, or its numbers, as from `random_numbers`. tokens_per_pass: in one forward pass of a model that
    scores, prompts and padding included. ranks: each writes and scores its own rows, and returns the whole rollout.
    """
    penalty = penalty or Penalty(coef=task.config.kl_coef)
    numbers = chance if isinstance(chance, Tensor) else random_numbers(task, len(prompts), chance)
    own = ranks.share(len(prompts))
    part = prompts.select(range(len(prompts))[own])

    with phase("decode"), whole(model):
        generation = ranks.together(lambda: write(task, model, part, numbers[own], decoding))

    def read() -> TensorDict | None:
        if generation is None:
            return None
        readings = read_responses(task, generation.state, part.texts, tokens_per_pass, part.fields)
        reference = readings.reference_log_prob
        kl = estimate_kl(task, model, generation, reference, penalty.estimator, tokens_per_pass)
        return _as_tensors(generation, readings, kl)

    with phase("score"), whole(*readers(task), *[model] * (penalty.estimator == EXACT)):
        written = [rows for rows in ranks.each(read) if rows is not None]
    generation, readings, kl = _as_objects(task, prompts, _joined(written).to(task.device))
    scored = pay(task, readings)
    data = _rollout(task, generation, scored, kl, penalty)
    metrics = rollout_metrics(data) | part_metrics(scored.score_parts)
    if task.reference is not None:
        metrics |= kl_metrics(data) | {"kl_coef": penalty.coef}
    return TextRollout(data, metrics, prompts.texts, scored)


def write(
    task: Task, model: PreTrainedModel, prompts: Prompts, numbers: Tensor, decoding: Decoding | None
) -> Generation | None:
    """One response to each prompt at the task's temperature; None if there is no prompt."""
    sampling = Sampling(temperature=task.config.temperature)
    return generate(task, model, prompts, sampling, numbers, decoding) if prompts.texts else None


def readers(task: Task) -> list[PreTrainedModel]:
    """The models that read responses: for the reward, and for the penalty."""
    reference = [] if task.reference is None else [task.reference.model]
    return [*(reward.model for reward in reward_models(task.reward)), *reference]


def _rollout(task: Task, generation: Generation, scored: ScoredResponses, kl: Tensor, penalty: Penalty) -> TensorDict:
    """The tensors of a rollout; see the module's docstring."""
    state = generation.state
    mask = state.response_mask
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
            "step_score": scored.token_score,
            "reference_log_prob": scored.reference_log_prob,
            "kl": kl,
            "score": scored.score,
            "kl_coef": torch.full_like(scored.score, penalty.coef),
        },
        batch_size=[len(mask)],
        device=task.device,
    )
    if task.normalizer is not None:
        data["raw_final_score"], data["token_score"] = scored.raw_final, scored.token_rewards
    if generation.allowed is not None:
        data["allowed_ids"], data["allowed_inside"] = generation.allowed.ids, generation.allowed.inside
    return data


def _as_tensors(generation: Generation, readings: Readings, kl: Tensor) -> TensorDict:
    """What ranks exchange of the responses that one of them has written, batch size [b]."""
    state, raw = generation.state, readings.raw
    tensors: dict[str, Any] = {
        "input_ids": state.input_ids,
        "attention_mask": state.attention_mask,
        "mask": state.response_mask,
        "log_prob": generation.log_prob,
        "reference_log_prob": readings.reference_log_prob,
        "kl": kl,
        "finish_code": readings.finish_code,
        "final": raw.final,
        "parts": dict(raw.parts),
    }
    if raw.tokens is not None:
        tensors["tokens"] = raw.tokens
    if generation.allowed is not None:
        tensors["allowed_ids"], tensors["allowed_inside"] = generation.allowed.ids, generation.allowed.inside
    return TensorDict(tensors, batch_size=[len(kl)])


def _joined(parts: list[TensorDict]) -> TensorDict:
    """The rows of all parts. Sets of allowed tokens are as wide as the widest."""
    if len(parts) == 1:
        return parts[0]
    if "allowed_ids" in parts[0]:
        widest = max(part["allowed_ids"].shape[-1] for part in parts)
        for part in parts:
            ids = part["allowed_ids"]
            part["allowed_ids"] = nn.functional.pad(ids, (0, widest - ids.shape[-1]), value=-1)
    return torch.cat(parts)  # type: ignore[arg-type, return-value]


def _as_objects(task: Task, prompts: Prompts, rows: TensorDict) -> tuple[Generation, Readings, Tensor]:
    """Responses, readings and KL [B, R] from the tensors of `_as_tensors`."""
    state = TextState.from_masks(rows["input_ids"], rows["attention_mask"], rows["mask"])
    sets = TokenSets(rows["allowed_ids"], rows["allowed_inside"]) if "allowed_ids" in rows else None
    parts: Any = rows["parts"]
    raw = Scores(rows["final"], dict(parts.items()), rows.get("tokens", None))
    fields: dict[str, Any] = dict(prompts.fields)
    code = rows["finish_code"]
    batch = ResponseBatch(list(prompts.texts), state, code == STOP, task.tokenizer, fields)
    return Generation(state, rows["log_prob"], sets), Readings(raw, rows["reference_log_prob"], code, batch), rows["kl"]


def trim(batch: TensorDict, prompt: int, response: int) -> TensorDict:
    """The batch without the columns that are padding in every row.

    prompt, response: tokens of the longest prompt, which ends in column P, and of the longest response, which starts
    there.
    """
    total, budget = batch["mask"].shape[1], batch["attention_mask"].shape[1]  # R, L
    start, response = budget - total, max(response, 1)
    trimmed = {}
    for key, value in batch.items():
        if value.ndim > 1 and value.shape[1] == budget:
            value = value[:, start - prompt : start + response]
        elif value.ndim > 1 and value.shape[1] == total:
            value = value[:, :response]
        trimmed[key] = value
    return TensorDict(trimmed, batch_size=batch.batch_size, device=batch.device)


def rollout_metrics(data: TensorDict) -> dict[str, float]:
    """Statistics of the sampled responses.

    `entropy` is the mean of −log π over the sampled tokens, in nats per token.
    """
    mask = data["mask"]
    return {
        "score": float(data["score"].mean()),
        "score_std": float(data["score"].std(correction=0)),
        "penalized_return": float(
            penalized_reward(data["step_score"], data["kl"], data["kl_coef"][:, None]).sum(1).mean()
        ),
        "entropy": float(-masked_mean(data["action_log_prob"], mask)),
        "length": float(mask.sum(1).float().mean()),
    }


def part_metrics(parts: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each reward of a weighted sum, as `score/NAME`; empty if there is one reward.

    parts: float32 [B] each.
    """
    return {f"score/{name}": float(part.mean()) for name, part in parts.items()} if len(parts) > 1 else {}


def kl_metrics(data: TensorDict) -> dict[str, float]:
    """KL of the policy to the reference in nats, by k1 whatever the penalty's estimator."""
    log_ratio = (data["action_log_prob"] - data["reference_log_prob"]).where(data["mask"], 0.0)  # [B, R]
    return {
        "kl_per_response": float(log_ratio.sum(1).mean()),
        "kl_per_token": float(log_ratio.sum() / data["mask"].sum()),
    }


def estimate_kl(
    task: Task,
    model: PreTrainedModel,
    generation: Generation,
    reference_log_prob: Tensor,
    estimator: str,
    tokens_per_pass: int | None,
) -> Tensor:
    """The KL to the reference at every token that `model` sampled; zeros without a reference.

    `exact` costs one more forward of both models, `tokens_per_pass` tokens at a time. Returns float32 [B, R], zero
    outside the response.
    """
    if task.reference is None:
        return torch.zeros_like(reference_log_prob)
    if estimator == EXACT:
        return response_kl(model, task.reference.model, generation, task.config.temperature, tokens_per_pass)
    return ESTIMATORS[estimator](generation.log_prob, reference_log_prob)
