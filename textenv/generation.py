"""The fast path: whole responses at once, then one teacher-forced pass of each frozen model.

`generate` samples responses from any language model, one cached token at a time. `score_responses` computes the
reference log-probabilities, scores and rewards of finished responses. The numbers equal those of stepping through
dynamics.py, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.kl import check_finite_steps, environment_reward, exact_kl, not_finite
from textenv.masks.masks import Masker
from textenv.masks.token_sets import TokenSets
from textenv.models.decoding import new_decoder
from textenv.models.logits import log_probs_at, map_states, read_logits, spread
from textenv.models.sampling import Sampling, sample
from textenv.prompts.tokenized import Prompts
from textenv.rewards.base import ResponseBatch, read_scores
from textenv.state import (
    FINISH_REASONS,
    RUNNING,
    STOP,
    TextState,
    finish,
    in_batches,
    own_settings,
    start,
)
from textenv.task import Task


@dataclass(frozen=True)
class Generation:
    """Finished responses and the log-probabilities under which they were sampled."""

    state: TextState
    log_prob: Tensor  # float32 [B, R], after action masks; zero at tokens not generated
    allowed: TokenSets | None  # [B, R], the tokens that the action masks allowed; None without masks


@dataclass(frozen=True)
class ScoredResponses:
    """Scores and rewards of B finished responses."""

    reward: Tensor  # float32 [B, R], the environment's reward at each token
    token_score: Tensor  # float32 [B, R], the part of `reward` that is score; `reward` adds β · reference_log_prob
    reference_log_prob: Tensor  # float32 [B, R], zero at tokens not generated, and where kl_coef is 0
    raw_final: Tensor  # float32 [B], what the last token pays before normalization
    token_rewards: Tensor  # float32 [B, R], the part of `token_score` that per-token rewards pay, never normalized
    score: Tensor  # float32 [B], the response's score: the sum of token_score over its tokens
    score_parts: dict[str, Tensor]  # reward name -> float32 [B], its share before weights and normalization
    finish_code: Tensor  # int64 [B], STOP or LENGTH
    batch: ResponseBatch  # what the reward saw

    @property
    def responses(self) -> list[str]:
        """B texts, without special tokens. Decoded on first use."""
        return self.batch.responses

    def finish_reason(self, row: int) -> str:
        """`"stop"` or `"length"`."""
        return FINISH_REASONS[int(self.finish_code[row])]


@own_settings()
def generate(
    task: Task, model: PreTrainedModel, prompts: Prompts, sampling: Sampling, generator: torch.Generator
) -> Generation:
    """Sample one response to each prompt from `model`."""
    budget = task.config.max_new_tokens
    stops = torch.tensor(task.stop_token_ids, device=task.device)
    state = start(prompts.input_ids, prompts.attention_mask, budget, task.pad_token_id)
    rows, width = state.input_ids.shape
    log_prob = torch.zeros(rows, budget, device=task.device)
    code = torch.full((rows,), RUNNING, device=task.device)
    cached = torch.arange(rows, device=task.device)  # [b], the rows that the decoder still holds
    shape = (rows, width, task.vocabulary)
    decoder = new_decoder(model, *shape)
    masker = Masker(task.masks, task.stop_token_ids, shape) if task.masks else None
    decoders = [decoder] if masker is None else [decoder, masker]
    for each in decoders:
        each.restart(state, cached)
    allowed_sets: list[TokenSets] = []
    for step in range(budget):
        running, logits = code == RUNNING, decoder.logits  # [B], [b, V]
        _check_logits(logits, running, cached, step)
        if masker is not None:
            texts = [prompts.texts[row] for row in cached.tolist()]
            allowed = masker.allowed(state.select(cached), texts, running[cached])  # [b, V]
            allowed_sets.append(TokenSets.of(allowed).scatter(cached, rows))
            logits = logits.masked_fill(~allowed, -torch.inf)
        drawn, drawn_log_prob = sample(logits, sampling, generator)
        tokens = torch.zeros_like(code).index_copy(0, cached, drawn)
        log_prob[cached, step] = drawn_log_prob.where(running[cached], 0.0)
        state = state.append(tokens, running)
        code = finish(tokens, state.length, stops, budget).where(running, code)
        unfinished = code[cached] == RUNNING  # [b]
        count = int(unfinished.sum())
        if count == 0:
            break
        if 2 * count <= len(cached):  # compacting copies the cache, so wait until half of the rows have finished
            for each in decoders:
                each.keep(unfinished.nonzero()[:, 0])
            cached = cached[unfinished]
        for each in decoders:
            each.advance(state.select(cached))
    return Generation(state, log_prob, _pad_steps(allowed_sets, rows, budget) if allowed_sets else None)


def _check_logits(logits: Tensor, running: Tensor, cached: Tensor, step: int) -> None:
    """Raise ValueError for logits [b, V] of the rows `cached` [b] that no token can be sampled from."""
    largest = logits.amax(-1)  # [b]; not finite if a logit is NaN or ∞, or if all are −∞
    bad = running[cached] & ~largest.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise not_finite("the largest of the policy's logits", largest[row], f"row {int(cached[row])}, token {step}")


def _pad_steps(sets: list[TokenSets], rows: int, budget: int) -> TokenSets:
    """The sets of all R steps; steps that no row reached allow every token."""
    device = sets[0].ids.device
    empty = TokenSets(
        torch.empty(rows, 0, dtype=torch.int32, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    )
    return TokenSets.stack(sets + [empty] * (budget - len(sets)))


@own_settings()
def score_responses(
    task: Task,
    state: TextState,
    prompt_texts: Sequence[str],
    tokens_per_pass: int | None = None,
    fields: Mapping[str, Sequence[Any]] | None = None,
) -> ScoredResponses:
    """Scores and rewards of finished responses.

    The reward sees all of them at once. Models read them in batches of similar length.
    prompt_texts: B; tokens_per_pass: read by a model in one forward, see `in_batches`; fields: the prompts' further
    fields (`Prompts.fields`), B values each, for rewards that read them. Raises ValueError for an unfinished response.
    """
    if len(prompt_texts) != len(state.length):
        raise ValueError(
            f"score_responses got {len(state.length)} responses and {len(prompt_texts)} prompt texts; give one text "
            "per response."
        )
    code = _finish_codes(task, state)
    batch = ResponseBatch(
        list(prompt_texts), state, code == STOP, task.tokenizer, fields or {}, tokens_per_pass=tokens_per_pass
    )
    raw = scores = read_scores(task.reward, batch)
    mask = state.response_mask  # [B, R]
    if task.reference is None:
        reference_log_prob = torch.zeros(mask.shape, device=mask.device)
    else:
        reference_log_prob = _log_probs(task.reference.model, state, task.config.temperature, tokens_per_pass)
        check_finite_steps(reference_log_prob, "the reference's log-probability")
    if task.normalizer is not None:  # last: an error above must not move running statistics
        scores = task.normalizer(raw)
    token_rewards = torch.zeros_like(reference_log_prob) if raw.tokens is None else raw.tokens  # [B, R]
    token_score = token_rewards + scores.final[:, None].where(state.last_generated, 0.0)  # [B, R]
    return ScoredResponses(
        reward=environment_reward(token_score, reference_log_prob, task.config.kl_coef),
        token_score=token_score,
        reference_log_prob=reference_log_prob,
        raw_final=raw.final,
        token_rewards=token_rewards,
        score=scores.total,
        score_parts=scores.parts,
        finish_code=code,
        batch=batch,
    )


@own_settings()
def response_log_probs(
    model: PreTrainedModel, state: TextState, temperature: float, tokens_per_pass: int | None = None
) -> Tensor:
    """Log-probabilities of responses under `model`, by full forwards without gradients.

    tokens_per_pass: read in one forward, see `in_batches`. Returns float32 [B, R], zero at tokens not generated.
    """
    log_prob = _log_probs(model, state, temperature, tokens_per_pass)
    check_finite_steps(log_prob, "the model's log-probability")
    return log_prob


@own_settings()
def response_kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    generation: Generation,
    temperature: float,
    tokens_per_pass: int | None = None,
) -> Tensor:
    """The exact KL to the reference at every generated token, by full forwards of both models.

    Where action masks forbade tokens, the model's distribution is the one over the allowed tokens.
    tokens_per_pass: read in one forward, see `in_batches`. Returns float32 [B, R], zero at tokens not generated.
    """
    kl = in_batches(
        lambda rows: _exact_kl((model, reference), generation, rows, temperature),
        generation.state.attention_mask.sum(1),
        tokens_per_pass,
    )
    check_finite_steps(kl, "the exact KL of the policy to the reference")
    return kl


def _exact_kl(
    models: tuple[PreTrainedModel, PreTrainedModel], generation: Generation, rows: Tensor, temperature: float
) -> Tensor:
    """The exact KL of some rows, float32 [b, R]."""
    state, sets = generation.state.select(rows), generation.allowed
    mask = state.response_mask
    logits = [read_logits(model, state.input_ids, state.attention_mask, mask) for model in models]
    if sets is None:
        return spread(map_states(lambda own, other: exact_kl(own, other, temperature), logits), mask)

    def masked_kl(own: Tensor, reference: Tensor, ids: Tensor, inside: Tensor) -> Tensor:
        allowed = TokenSets(ids, inside).dense(own.shape[-1])
        return exact_kl(own.masked_fill(~allowed, -torch.inf), reference, temperature)

    return spread(map_states(masked_kl, logits, sets.ids[rows][mask], sets.inside[rows][mask]), mask)


def _log_probs(model: PreTrainedModel, state: TextState, temperature: float, tokens_per_pass: int | None) -> Tensor:
    def log_probs(rows: Tensor) -> Tensor:
        part = state.select(rows)
        mask = part.response_mask
        logits = read_logits(model, part.input_ids, part.attention_mask, mask)
        return spread(log_probs_at(logits, part.response_ids[mask], temperature), mask)

    return in_batches(log_probs, state.attention_mask.sum(1), tokens_per_pass)


def _finish_codes(task: Task, state: TextState) -> Tensor:
    """How each response ended, int64 [B] of STOP and LENGTH. Raises ValueError for an unfinished response."""
    stops = torch.tensor(task.stop_token_ids, device=task.device)
    last_tokens = state.response_ids.where(state.last_generated, 0).sum(1)  # [B]
    code = finish(last_tokens, state.length, stops, task.config.max_new_tokens)
    code = code.where(state.response_mask.any(1), RUNNING)
    unfinished = code == RUNNING
    if bool(unfinished.any()):
        raise ValueError(
            f"score_responses needs finished responses, but row {int(unfinished.nonzero()[0])} neither "
            "ends with a generated stop token nor fills the token budget, or has no generated token; finish it first."
        )
    return code
