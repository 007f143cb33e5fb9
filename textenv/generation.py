"""The fast path: whole responses at once, then one teacher-forced pass of each frozen model.

Two verbs. `generate` writes responses with any language model, one cached token at a time. `score_responses` gives
finished responses their reference log-probabilities, scores and rewards: the numbers that stepping through
dynamics.py gives, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.kl import environment_reward, exact_kl
from textenv.masks.masks import Masker
from textenv.masks.token_sets import TokenSets
from textenv.models.language_model import CachedDecoder, response_logits
from textenv.models.sampling import Sampling, chosen_log_probs, sample
from textenv.prompts.tokenized import Prompts
from textenv.rewards.base import ResponseBatch, Scores, concatenate, read_scores
from textenv.rewards.normalization import normalize
from textenv.state import FINISH_REASONS, RUNNING, STOP, TextState, finish, start
from textenv.task import Task


@dataclass(frozen=True)
class Generation:
    """Finished responses and the log-probabilities under which they were sampled."""

    state: TextState
    log_prob: Tensor  # float32 [B, R], zero outside the response; under the masks, where there are any
    allowed: TokenSets | None  # [B, R], what the masks allowed; None without masks


@dataclass(frozen=True)
class ScoredResponses:
    """What the environment says of finished responses."""

    reward: Tensor  # float32 [B, R], what the environment pays at each token
    token_score: Tensor  # float32 [B, R], the part of `reward` that is score; `reward` adds β · reference_log_prob
    reference_log_prob: Tensor  # float32 [B, R], zero at tokens not generated, and where kl_coef is 0
    score: Tensor  # float32 [B], the response's score: the sum of token_score over its tokens
    score_parts: dict[str, Tensor]  # float32 [B] each, what every reward gave under its name
    finish_code: Tensor  # int64 [B], STOP or LENGTH
    responses: list[str]

    def finish_reason(self, row: int) -> str:
        """`"stop"` or `"length"`."""
        return FINISH_REASONS[int(self.finish_code[row])]


@torch.no_grad()
def generate(
    task: Task, model: PreTrainedModel, prompts: Prompts, sampling: Sampling, generator: torch.Generator
) -> Generation:
    """One response to each prompt, sampled from `model`."""
    budget = task.config.max_new_tokens
    stops = torch.tensor(task.stop_token_ids, device=task.device)
    state = start(prompts.input_ids, prompts.attention_mask, budget, task.pad_token_id)
    rows, width = state.input_ids.shape
    log_prob = torch.zeros(rows, budget, device=task.device)
    code = torch.full((rows,), RUNNING, device=task.device)
    cached = torch.arange(rows, device=task.device)  # the rows that are still being read
    shape = (rows, width, task.vocabulary)
    reader = CachedDecoder(model, *shape)
    masker = Masker(task.masks, task.stop_token_ids, shape) if task.masks else None
    readers = [one for one in (reader, masker) if one is not None]
    for one in readers:
        one.restart(state, cached)
    sets: list[TokenSets] = []
    for step in range(budget):
        running, logits = code == RUNNING, reader.logits  # [B], [b, V]
        if masker is not None:
            texts = [prompts.texts[row] for row in cached.tolist()]
            allowed = masker.allowed(state.select(cached), texts, running[cached])  # [b, V]
            sets.append(TokenSets.of(allowed).scatter(cached, rows))
            logits = logits.masked_fill(~allowed, -torch.inf)
        drawn, drawn_log_prob = sample(logits, sampling, generator)
        tokens = torch.zeros_like(code).index_copy(0, cached, drawn)
        log_prob[cached, step] = drawn_log_prob.where(running[cached], 0.0)
        state = state.append(tokens, running)
        code = finish(tokens, state.length, stops, budget).where(running, code)
        going_on = code[cached] == RUNNING
        left = int(going_on.sum())
        if left == 0:
            break
        if 2 * left <= len(cached):  # finished rows cost work for nothing: drop them, now and then
            for one in readers:
                one.keep(going_on.nonzero()[:, 0])
            cached = cached[going_on]
        for one in readers:
            one.advance(state.select(cached))
    return Generation(state, log_prob, _padded(sets, rows, budget) if sets else None)


def _padded(sets: list[TokenSets], rows: int, budget: int) -> TokenSets:
    """Sets of all R steps; all tokens were allowed at those that no row reached."""
    device = sets[0].ids.device
    empty = TokenSets(
        torch.empty(rows, 0, dtype=torch.int32, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    )
    return TokenSets.stack(sets + [empty] * (budget - len(sets)))


@torch.no_grad()
def score_responses(
    task: Task,
    state: TextState,
    prompt_texts: Sequence[str],
    rows_per_pass: int = 64,
    fields: Mapping[str, Sequence[Any]] | None = None,
) -> ScoredResponses:
    """Scores and rewards of finished responses, some rows at a time.

    fields: the prompts' further fields (`Prompts.fields`), one value a response, for rewards that read them.
    """
    rows_given = len(state.length)
    if len(prompt_texts) != rows_given:
        raise ValueError(
            f"score_responses got {rows_given} responses and {len(prompt_texts)} prompt texts; give one "
            "text a response."
        )
    read = []
    for rows in torch.arange(rows_given, device=task.device).split(rows_per_pass):
        indices: list[int] = rows.tolist()
        own = {name: [values[index] for index in indices] for name, values in (fields or {}).items()}
        texts = [prompt_texts[index] for index in indices]
        read.append(_read(task, state.select(rows), texts, own, indices))
    # All rows at once: what a score is measured by must not depend on how many are read at a time.
    scores = normalize(task.normalizer, concatenate([one.scores for one in read]))
    reference_log_prob = torch.cat([one.reference_log_prob for one in read])
    token_score = scores.final[:, None].where(state.last_generated, 0.0)  # [B, R]
    if scores.tokens is not None:
        token_score = token_score + scores.tokens
    return ScoredResponses(
        reward=environment_reward(token_score, reference_log_prob, task.config.kl_coef),
        token_score=token_score,
        reference_log_prob=reference_log_prob,
        score=scores.total,
        score_parts=scores.parts,
        finish_code=torch.cat([one.finish_code for one in read]),
        responses=[text for one in read for text in one.responses],
    )


def response_log_probs(model: PreTrainedModel, state: TextState, temperature: float, rows_per_pass: int = 64) -> Tensor:
    """Log-probabilities that `model` gives to responses, by full forwards without gradients.

    Returns float32 [B, R], zero outside the response.
    """
    with torch.no_grad():
        rows = torch.arange(len(state.length), device=state.length.device)
        return torch.cat([_log_probs(model, state.select(part), temperature) for part in rows.split(rows_per_pass)])


@torch.no_grad()
def response_kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    generation: Generation,
    temperature: float,
    rows_per_pass: int = 64,
) -> Tensor:
    """The exact KL to the reference at every token that `model` has sampled, by full forwards of both.

    Where masks forbade tokens, the model's distribution is the one over the others. Logits are held for
    `rows_per_pass` rows at a time. Returns float32 [B, R], zero outside the response.
    """
    rows = torch.arange(len(generation.log_prob), device=generation.log_prob.device)
    parts = [_exact_kl((model, reference), generation, part, temperature) for part in rows.split(rows_per_pass)]
    return torch.cat(parts)


def _exact_kl(
    models: tuple[PreTrainedModel, PreTrainedModel], generation: Generation, rows: Tensor, temperature: float
) -> Tensor:
    state = generation.state.select(rows)
    texts = (state.input_ids, state.attention_mask, state.prompt_width)
    logits, reference_logits = (response_logits(model, *texts) for model in models)  # [b, R, V]
    if generation.allowed is not None:
        sets = TokenSets(generation.allowed.ids[rows], generation.allowed.inside[rows])
        logits = logits.masked_fill(~sets.dense(logits.shape[-1]), -torch.inf)
    return exact_kl(logits, reference_logits, temperature).where(state.response_mask, 0.0)


def _log_probs(model: PreTrainedModel, state: TextState, temperature: float) -> Tensor:
    logits = response_logits(model, state.input_ids, state.attention_mask, state.prompt_width)
    return chosen_log_probs(logits, state.response_ids, temperature).where(state.response_mask, 0.0)


@dataclass(frozen=True)
class _Reading:
    """What the frozen models and the rewards say of some rows."""

    scores: Scores  # as the rewards give them
    reference_log_prob: Tensor
    finish_code: Tensor
    responses: list[str]


def _read(
    task: Task, state: TextState, prompt_texts: list[str], fields: dict[str, list[Any]], rows: list[int]
) -> _Reading:
    """Some rows read by all frozen models; rows: which of all they are."""
    stops = torch.tensor(task.stop_token_ids, device=task.device)
    mask = state.response_mask  # [B, R]
    last_tokens = state.response_ids.where(state.last_generated, 0).sum(1)  # [B]
    code = finish(last_tokens, state.length, stops, task.config.max_new_tokens).where(mask.any(1), RUNNING)
    if bool((code == RUNNING).any()):
        raise ValueError(
            f"score_responses reads finished responses, and row {rows[int((code == RUNNING).nonzero()[0])]} has "
            "neither a stop token at its end nor the whole budget of tokens; write it to its end first."
        )
    episodes = ResponseBatch(prompt_texts, state, code == STOP, task.tokenizer, fields, rows)
    scores = read_scores(task.reward, episodes)
    if task.reference is None:
        reference_log_prob = torch.zeros(mask.shape, device=mask.device)
    else:
        reference_log_prob = _log_probs(task.reference.model, state, task.config.temperature)
    return _Reading(scores, reference_log_prob, code, episodes.responses)
