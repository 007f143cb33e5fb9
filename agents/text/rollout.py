"""Rollouts of whole responses as TensorDicts: sampled by the actor on the fast path, scored by the environment.

Keys of a rollout, batch size [B]: `input_ids` and `attention_mask` [B, L]; `action`, `action_log_prob`, `mask`, `done`,
`terminated`, `step_score`, `reference_log_prob` and `kl`, an estimate of the KL, [B, R]; the response's `score` and β,
`kl_coef`, [B]; with normalized scores also `raw_final_score` [B], what the last token paid before normalization, and
`token_score` [B, R], what is not normalized; with action masks also `allowed_ids` [B, R, K] and `allowed_inside`
[B, R], the two halves of a `TokenSets`. Per-step numbers are zero outside the mask.

The penalty of a run is here too: the estimator of the KL and the controller of its weight β.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.objectives.advantages import masked_mean, response_ends
from agents.reporting.phases import phase
from agents.seeds import seed_of, torch_generator
from agents.text.config import TextConfig
from agents.text.lora import merged_model
from agents.text.networks import language_model_of
from agents.text.precision import Precision, mismatch
from textenv.generation import Generation, ScoredResponses, generate, response_kl, score_responses
from textenv.kl import ESTIMATORS, EXACT, AdaptiveKL, Controller, FixedKL, penalized_reward
from textenv.masks.masks import MaskPolicy
from textenv.models.decoding import Decoding
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import Prompts
from textenv.rewards.normalization import RAW
from textenv.state import batches, own_settings, pass_tokens
from textenv.task import Task


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


@own_settings()
def collect(
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    generator: torch.Generator,
    tokens_per_pass: int | None,
    penalty: Penalty | None = None,
    decoding: Decoding | None = None,
) -> TextRollout:
    """One response to each prompt; `penalty` defaults to the environment's β with k1.

    tokens_per_pass: in one forward pass of a model that scores, prompts and padding included.
    """
    penalty = penalty or Penalty(coef=task.config.kl_coef)
    sampling = Sampling(temperature=task.config.temperature)
    with phase("decode"):
        generation = generate(task, model, prompts, sampling, generator, decoding)
    state = generation.state
    with phase("score"):
        scored = score_responses(task, state, prompts.texts, tokens_per_pass, prompts.fields)
        kl = estimate_kl(task, model, generation, scored.reference_log_prob, penalty.estimator, tokens_per_pass)
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
        batch_size=[len(prompts)],
        device=task.device,
    )
    if task.normalizer is not None:
        data["raw_final_score"], data["token_score"] = scored.raw_final, scored.token_rewards
    if generation.allowed is not None:
        data["allowed_ids"], data["allowed_inside"] = generation.allowed.ids, generation.allowed.inside
    metrics = rollout_metrics(data) | part_metrics(scored.score_parts)
    if task.reference is not None:
        metrics |= kl_metrics(data) | {"kl_coef": penalty.coef}
    return TextRollout(data, metrics, prompts.texts, scored)


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


def make_controller(config: TextConfig, kl_coef: float) -> Controller:
    """The controller of β, which starts at the environment's `kl_coef`."""
    if config.kl_controller == "fixed" or kl_coef == 0:  # a run with an adaptive β of 0 is refused: TextConfig.UNREAD
        return FixedKL(kl_coef)
    assert config.kl_target is not None  # TextConfig checks it
    return AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon, config.kl_unit)


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


READ = ("input_ids", "attention_mask", "action", "mask", "allowed_ids", "allowed_inside")  # by an actor
REPORT_ONLY = ("td_error", "raw_advantage", "kl", "step_score", "score", "raw_final_score", "token_score")  # no loss's
# Keys that no learner from replay needs. It forms rewards when rows are sampled, from raw scores if there are any.
NOT_REPLAYED = ("kl", "score", "action_log_prob")


class TextCollector:
    """Collects rollouts of responses: see `agents.interfaces.Collector`."""

    unit = "tokens"

    def __init__(self, task: Task, prompts: Prompts, config: TextConfig, seed: int, ratios: bool = True) -> None:
        """ratios: whether the learner divides by old probabilities."""
        check_groups(config, task)
        self.task, self.prompts, self.config = task, prompts, config
        self.precision = Precision(config.precision, task.device)
        self.decoding = Decoding(slots=config.decode_slots, compile=config.compile)
        choice = config.old_log_probs
        self.recompute = ratios and (choice == "recomputed" or (choice == "auto" and self.precision.half))
        self.controller = make_controller(config, task.config.kl_coef)  # of β
        self.mask_policies = [mask for mask in task.masks if isinstance(mask, MaskPolicy)]
        for mask in self.mask_policies:
            mask.refresh(task.load_reference().model)  # so that it has weights of its own for a checkpoint to restore
        self.mismatch: dict[str, float] = {}  # of the latest rollout, if log-probabilities are recomputed
        self.sampler = task.prompt_sampler(prompts, "shuffle")
        self.prompt_generator = np.random.default_rng(seed_of(seed, "prompts"))
        self.sampling_generator = torch_generator(seed, "sampling", task.device)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models of the mask policies."""
        models = {f"mask_policy_{index}": mask.model for index, mask in enumerate(self.mask_policies)}
        return {name: model for name, model in models.items() if model is not None}

    def collect(self, policy: nn.Module) -> TextRollout:
        """One rollout of responses by the language model in `policy`."""
        indices = self.sampler.draw(self.prompt_generator, self.config.rollout_size)
        prompts, tokens = self.prompts.select(indices), self.config.micro_batch_tokens
        with self.precision.tensor_cores():
            model = self.sampling_model(policy)
            rollout = collect(self.task, model, prompts, self.sampling_generator, tokens, self.penalty(), self.decoding)
        if self.recompute:
            with phase("recompute"):
                self.mismatch = self._recompute_log_probs(policy, rollout.data)
            rollout.metrics.update(self.mismatch)
        # Raw scores: normalized ones of different times are in different units.
        raw = rollout.scored.score if self.task.normalizer is None else rollout.scored.score_parts[RAW]
        self.sampler.update(indices, raw.tolist())
        if self.task.reference is not None:
            kl, lengths = rollout.data["kl"], rollout.data["mask"].sum(1)
            rollout.metrics.update(self.controller.update(float(kl.sum()), int(lengths.sum()), len(lengths)))
        return rollout

    def sampling_model(self, policy: nn.Module) -> PreTrainedModel:
        """The model that writes the responses of a policy, with its present weights."""
        return self.precision.sampling_model(language_model_of(policy))

    @own_settings()
    def _recompute_log_probs(self, policy: Any, data: TensorDict) -> dict[str, float]:
        """Replace `action_log_prob` by that of the training forward. Returns the metrics of the difference."""
        sampled, places = data["action_log_prob"], torch.arange(len(data), device=data["mask"].device)
        recomputed = torch.zeros_like(sampled)
        for batch in self.micro_batches(data.select(*READ, strict=False).set("row", places)):
            with self.autocast():
                log_prob = policy.distribution(batch).log_prob(batch["action"])
            recomputed[batch["row"], : log_prob.shape[1]] = log_prob
        data["action_log_prob"] = recomputed
        return mismatch(sampled, recomputed, data["mask"])

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the run, for one forward of trained networks."""
        return self.precision.autocast()

    def describe_precision(self) -> dict[str, Any]:
        """For the summary: the precision, where ratios start from, and the latest mismatch if that was recomputed."""
        return {
            "precision": self.precision.name,
            "old_log_probs": "recomputed" if self.recompute else "sampled",
            **self.mismatch,
        }

    def training_rows(self, data: TensorDict) -> TensorDict:
        """Whole responses, without the keys for the report."""
        return data.exclude(*REPORT_ONLY)

    def replay_rows(self, data: TensorDict) -> TensorDict:
        """Whole responses with their scores before normalization."""
        unused = (*NOT_REPLAYED, "step_score") if self.task.normalizer is not None else NOT_REPLAYED
        return data.exclude(*unused)

    def from_replay(self, rows: TensorDict) -> TensorDict:
        """Rows with `step_score`, the final score normalized by the present statistics."""
        if (normalizer := self.task.normalizer) is not None:
            final = normalizer.normalized(rows["raw_final_score"])  # [B]
            rows["step_score"] = rows["token_score"] + final[:, None].where(rows["done"], 0.0)
        return rows

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """Texts of similar length together, which saves padding; `micro_batch_tokens` in each part."""
        attention, width = minibatch["attention_mask"], minibatch["mask"].shape[1]
        parts = attention.split([attention.shape[1] - width, width], 1)
        lengths = torch.stack([part.sum(1) for part in parts]).cpu()  # [2, B], the only wait for the device
        for rows in batches(lengths.sum(0), self.config.micro_batch_tokens or pass_tokens(self.task.device)):
            yield trim(minibatch[rows.to(attention.device)], *lengths[:, rows].amax(1).tolist())

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Refresh mask policies every `mask_refresh` iterations (NLPO)."""
        if self.config.mask_refresh and iteration % self.config.mask_refresh == 0:
            for mask in self.mask_policies:
                mask.refresh(merged_model(policy))

    def penalty(self) -> Penalty:
        """The penalty of the next rollout."""
        return Penalty(coef=self.controller.coef, estimator=self.config.kl_estimator)

    def state_dict(self) -> dict[str, Any]:
        """β, the prompts' order, generators and running statistics."""
        state = {
            "kl_controller": self.controller.state_dict(),
            "sampler": self.sampler.state_dict(),
            "prompt_generator": json.dumps(self.prompt_generator.bit_generator.state),
            "sampling_generator": self.sampling_generator.get_state(),
            "mismatch": self.mismatch,
        }
        if self.task.normalizer is not None:
            state["score_statistics"] = self.task.normalizer.statistics.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.load_statistics(state)
        self.sampler.load_state_dict(state["sampler"])
        self.mismatch = state["mismatch"]
        self.prompt_generator.bit_generator.state = json.loads(state["prompt_generator"])
        self.sampling_generator.set_state(state["sampling_generator"].cpu())

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Restore β and the statistics of scores alone."""
        self.controller.load_state_dict(state["kl_controller"])
        if self.task.normalizer is not None:
            self.task.normalizer.statistics.load_state_dict(state["score_statistics"])


def check_groups(config: TextConfig, task: Task) -> None:
    """Raise ValueError if a rollout would split a group of responses to one prompt."""
    if config.rollout_size % task.config.group_size:
        raise ValueError(
            f"a rollout must hold whole groups; got rollout_size={config.rollout_size} and group_size="
            f"{task.config.group_size}. Make rollout_size a multiple of group_size."
        )
