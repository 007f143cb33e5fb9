"""The decision process in batched tensors on one device: the only stepping code.

Episodes end and rewards are paid here, one token per row at a time. The environments (env.py, vector_env.py,
torchrl_env.py) wrap it and hold no logic of their own; the fast path (generation.py) gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textenv.kl import FiniteCheck, environment_reward, not_finite
from textenv.masks.masks import Masker
from textenv.models.decoding import new_decoder
from textenv.models.sampling import chosen_log_probs
from textenv.prompts.tokenized import Prompts
from textenv.rewards.base import (
    ResponseBatch,
    Scores,
    concatenate,
    last_token_rewards,
    newest,
    read_scores,
    token_members,
)
from textenv.rewards.normalization import RAW
from textenv.state import FINISH_REASONS, RUNNING, STOP, TextState, finish, own_settings, start
from textenv.task import Task


@dataclass(frozen=True)
class Transition:
    """The result of one step for B rows. Rows that were not active hold zeros."""

    state: TextState  # the next state
    reward: Tensor  # float32 [B]
    terminated: Tensor  # bool [B]
    finish_code: Tensor  # int64 [B], RUNNING, STOP or LENGTH
    reference_log_prob: Tensor  # float32 [B], zero where kl_coef is 0
    score: Tensor  # float32 [B], the finished response's score; zero while the episode runs
    score_parts: dict[str, Tensor]  # reward name -> float32 [B], its share of the score; zero while the episode runs
    responses: dict[int, str]  # row -> text, for the rows that ended

    def finish_reason(self, row: int) -> str:
        """`"stop"`, `"length"`, or the empty string while the episode runs."""
        return FINISH_REASONS[int(self.finish_code[row])]


@dataclass(frozen=True)
class EpisodePrompt:
    """The prompt of one row's episode."""

    index: int = -1  # its index in the task's prompts; -1 for the caller's own prompt
    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # its further fields


RowBatch = tuple[Tensor, ResponseBatch]  # indices of rows, int64 [b], and their responses


class TextDynamics:
    """B episodes side by side. Rows may be at different steps and restart at different times."""

    @own_settings()
    def __init__(self, task: Task, rows: int) -> None:
        self.task, self.rows = task, rows
        self.episode_prompts = [EpisodePrompt() for _ in range(rows)]
        self.token_members = token_members(task.reward)
        self.samplers = [task.prompt_sampler(task.prompts, "uniform") for _ in range(rows)]
        self.stop_token_ids = torch.tensor(task.stop_token_ids, device=task.device)
        prompts = task.prompts
        self.state = start(
            torch.full((rows, prompts.input_ids.shape[1]), task.pad_token_id, device=task.device),
            torch.zeros(rows, prompts.input_ids.shape[1], dtype=torch.bool, device=task.device),
            task.config.max_new_tokens,
            task.pad_token_id,
        )
        self.running = torch.zeros(rows, dtype=torch.bool, device=task.device)  # [B]
        shape = (rows, task.width, task.vocabulary)
        self.reference = None if task.reference is None else new_decoder(task.reference.model, *shape)
        self.masker = Masker(task.masks, self.stop_token_ids, shape) if task.masks else None
        all_tokens = torch.ones((), dtype=torch.bool, device=task.device).expand(rows, task.vocabulary)
        self.allowed = all_tokens  # bool [B, V], which tokens may come next; a view of one element without masks

    @property
    def prompt_index(self) -> list[int]:
        """The index of each row's prompt in the task's prompts; -1 for the caller's own prompt."""
        return [prompt.index for prompt in self.episode_prompts]

    def seed(self, row: int) -> None:
        """Restart a row's prompt sampler, so that the order of its prompts depends on the seed alone."""
        self.samplers[row] = self.task.prompt_sampler(self.task.prompts, "uniform")

    def draw(self, row: int, generator: np.random.Generator) -> int:
        """Draw the index of a row's next prompt."""
        return self.samplers[row].draw(generator, 1)[0]

    def reset(self, rows: Sequence[int], prompt_indices: Sequence[int]) -> TextState:
        """Start new episodes in these rows, from the task's prompts of these indices."""
        return self.begin(rows, self.task.prompts.select(prompt_indices), prompt_indices)

    @own_settings()
    def begin(self, rows: Sequence[int], prompts: Prompts, prompt_indices: Sequence[int]) -> TextState:
        """Start new episodes in these rows, from any prompts; an index is -1 for a prompt that is not the task's.

        If an action mask raises, the old episodes in these rows are over, and the rows may be started again.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device=self.task.device)
        self.running = self.running.index_fill(0, index, False)
        for place, (row, prompt_index) in enumerate(zip(rows, prompt_indices, strict=True)):
            fields = {name: values[place] for name, values in prompts.fields.items()}
            self.episode_prompts[row] = EpisodePrompt(prompt_index, prompts.texts[place], fields)
        budget = self.task.config.max_new_tokens
        fresh = start(prompts.input_ids, prompts.attention_mask, budget, self.task.pad_token_id)
        self.state = self.state.restart(index, fresh)
        if self.reference is not None:
            self.reference.restart(fresh, index)
        started = torch.zeros_like(self.running).index_fill(0, index, True)
        if self.masker is not None:
            self.masker.restart(self.state, index)
            self.allowed = self._masks(self.masker, self.state, started).where(started[:, None], self.allowed)
        self.running = self.running | started
        return self.state

    @own_settings()
    def action_mask(self) -> Tensor:
        """Which tokens may come next, bool [B, V]. All of them where no episode is running or no mask is set."""
        if self.masker is not None and self.masker.outdated():
            self.allowed = self._masks(self.masker, self.state, self.running)
        return self.allowed

    @own_settings()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Transition:
        """Append one token to every active row, and pay for it.

        tokens: int64 [B]; active: bool [B], by default all rows. Raises ValueError for an id outside the vocabulary,
        for a row without a running episode, and for a reward or a mask that returns something invalid. After an error
        nothing has changed, and the step may be tried again.
        """
        active = torch.ones_like(self.running) if active is None else active
        self._check(tokens, active)
        reference_log_prob = self._reference_log_prob(tokens, active)
        state = self.state.append(tokens, active)
        code = finish(tokens, state.length, self.stop_token_ids, self.task.config.max_new_tokens)
        code = code.where(active, RUNNING)
        ended, running = code != RUNNING, self.running & (code == RUNNING)
        batches = self._batches(state, code, ended)
        batch_scores = [read_scores(self.task.reward, batch) for _, batch in batches]
        unfinished = self._batches(state, code, active & running) if self.token_members else []
        token_reward = self._token_reward(batches, batch_scores, unfinished)
        responses = {row: text for rows, b in batches for row, text in zip(rows.tolist(), b.responses, strict=True)}
        allowed = self._masks_after(state, running)
        # User code (rewards, masks) has run. Only now does the state change, so an error above leaves the step undone.
        self.state, self.running, self.allowed = state, running, allowed
        scores = self._paid_scores(batches, batch_scores)
        self._update_samplers(ended, scores.total if self.task.normalizer is None else scores.parts[RAW])
        if self.reference is not None and bool(running.any()):
            self.reference.advance(state)
        reward = environment_reward(scores.final + token_reward, reference_log_prob, self.task.config.kl_coef)
        return Transition(state, reward, ended, code, reference_log_prob, scores.total, scores.parts, responses)

    def _check(self, tokens: Tensor, active: Tensor) -> None:
        bad = active & ((tokens < 0) | (tokens >= self.task.vocabulary))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"action {int(tokens[row])} in row {row} is not a token id; ids range from 0 to "
                f"{self.task.vocabulary - 1} (the action space)."
            )
        over = active & ~self.running
        if bool(over.any()):
            raise ValueError(
                f"the episode in row {int(over.nonzero()[0])} is over or was never started; call reset() first."
            )

    def _update_samplers(self, ended: Tensor, score: Tensor) -> None:
        """Record raw scores: normalized ones of different times are in different units."""
        for row in ended.nonzero()[:, 0].tolist():
            if self.episode_prompts[row].index >= 0:
                self.samplers[row].update([self.episode_prompts[row].index], [float(score[row])])

    def _masks(self, masker: Masker, state: TextState, rows: Tensor) -> Tensor:
        masker.finite = finite = FiniteCheck()
        allowed = masker.allowed(state, [prompt.text for prompt in self.episode_prompts], rows)
        if finite.notes and bool(finite.failed()):
            raise finite.error(range(self.rows))
        return allowed

    def _masks_after(self, state: TextState, running: Tensor) -> Tensor:
        """Which tokens may follow this state, bool [B, V]."""
        if self.masker is None:
            return self.allowed
        # Safe before the step is final: if it is tried again, the masks' decoders read the newest column again.
        if bool(running.any()):
            self.masker.advance(state)
        return self._masks(self.masker, state, running)

    def _reference_log_prob(self, tokens: Tensor, active: Tensor) -> Tensor:
        if self.reference is None:
            return torch.zeros(self.rows, device=self.task.device)
        tokens = tokens.where(active, 0)
        log_prob = chosen_log_probs(self.reference.logits, tokens, self.task.config.temperature).where(active, 0.0)
        finite = log_prob.isfinite()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            place = f"row {row}, token {int(self.state.generated_length[row])} (id {int(tokens[row])})"
            raise not_finite("the reference's log-probability", log_prob[row], place)
        return log_prob

    def _batches(self, state: TextState, code: Tensor, chosen: Tensor) -> list[RowBatch]:
        """The responses in the rows of `chosen` (bool [B]), one batch per set of prompt fields.

        All prompts of the task have the same fields, but the caller's own prompts may have others. The fields that a
        reward sees of a prompt must not depend on the other rows.
        """
        groups: dict[frozenset[str], list[int]] = {}
        for row in chosen.nonzero()[:, 0].tolist():
            groups.setdefault(frozenset(self.episode_prompts[row].fields), []).append(row)
        return [self._batch(state, code, rows) for rows in groups.values()]

    def _batch(self, state: TextState, code: Tensor, rows: list[int]) -> RowBatch:
        index, prompts = torch.tensor(rows, device=code.device), [self.episode_prompts[row] for row in rows]
        fields = {name: [prompt.fields[name] for prompt in prompts] for name in prompts[0].fields}
        texts, stopped = [prompt.text for prompt in prompts], code[index] == STOP
        return index, ResponseBatch(texts, state.select(index), stopped, self.task.tokenizer, fields, rows)

    def _token_reward(
        self, ended: Sequence[RowBatch], ended_scores: Sequence[Scores], unfinished: Sequence[RowBatch]
    ) -> Tensor:
        """What per-token rewards pay for the newest token of each row, float32 [B]."""
        paid = torch.zeros(self.rows, device=self.task.device)
        if self.token_members:
            for (rows, batch), scores in zip(ended, ended_scores, strict=True):
                assert scores.tokens is not None
                paid[rows] = newest(scores.tokens, batch.state)
            for rows, batch in unfinished:
                paid[rows] = last_token_rewards(self.token_members, batch)
        return paid

    def _paid_scores(self, batches: Sequence[RowBatch], batch_scores: Sequence[Scores]) -> Scores:
        """Normalized scores of all B rows, zero where the episode runs on."""
        if not batches:
            names = self.task.score_part_names
            zero, *parts = torch.zeros(1 + len(names), self.rows, device=self.task.device)
            return Scores(zero, dict(zip(names, parts, strict=True)))
        rows = torch.cat([rows for rows, _ in batches])
        scores = concatenate(batch_scores)
        if self.task.normalizer is not None:
            scores = self.task.normalizer(scores)
        return Scores(
            final=self._scatter(scores.final, rows),
            parts={name: self._scatter(part, rows) for name, part in scores.parts.items()},
            tokens=None if scores.tokens is None else self._scatter(scores.tokens, rows),
        )

    def _scatter(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of these rows, zeros in the others: [b, ...] -> [B, ...]."""
        return values.new_zeros(self.rows, *values.shape[1:]).index_copy(0, rows, values)
