"""The decision process, in batched tensors on one device: the only stepping code there is.

Here episodes end and rewards are paid, one token a row at a time; the faces (env.py, vector_env.py,
torchrl_env.py) hold no logic of their own, and the fast path (generation.py) gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textenv.kl import environment_reward
from textenv.masks.masks import Masker
from textenv.models.language_model import CachedDecoder
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
from textenv.rewards.normalization import normalize
from textenv.state import FINISH_REASONS, RUNNING, STOP, TextState, finish, start
from textenv.task import Task


@dataclass(frozen=True)
class Transition:
    """What one step gives, for B rows; rows that were not active hold zeros."""

    state: TextState  # the next state
    reward: Tensor  # float32 [B], what the environment pays
    terminated: Tensor  # bool [B]
    finish_code: Tensor  # int64 [B], RUNNING, STOP or LENGTH
    reference_log_prob: Tensor  # float32 [B], zero where kl_coef is 0
    score: Tensor  # float32 [B], all that the reward paid for the response; zero where the episode goes on
    score_parts: dict[str, Tensor]  # float32 [B] each, what every reward gave under its name; likewise
    responses: dict[int, str]  # row -> text, for the rows that ended

    def finish_reason(self, row: int) -> str:
        """`"stop"`, `"length"`, or the empty string while the episode goes on."""
        return FINISH_REASONS[int(self.finish_code[row])]


@dataclass(frozen=True)
class EpisodePrompt:
    """The prompt of one row's episode."""

    index: int = -1  # which of the task's prompts it is; -1 is one from elsewhere
    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # its further fields


Batch = tuple[Tensor, ResponseBatch]  # indices of rows, int64 [b], and these rows as rewards see them


class TextDynamics:
    """B episodes side by side. Rows may be at different places, and start anew at different times."""

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
        self.reference = None if task.reference is None else CachedDecoder(task.reference.model, *shape)
        self.masker = Masker(task.masks, task.stop_token_ids, shape) if task.masks else None
        every = torch.ones((), dtype=torch.bool, device=task.device).expand(rows, task.vocabulary)
        self.allowed = every  # bool [B, V], which tokens may come next; takes room only where masks are set

    @property
    def prompt_index(self) -> list[int]:
        """Which of the task's prompts each row plays; -1 is one from elsewhere."""
        return [one.index for one in self.episode_prompts]

    def seed(self, row: int) -> None:
        """Lets a row's order of prompts begin anew, so that it is decided by the seed alone."""
        self.samplers[row] = self.task.prompt_sampler(self.task.prompts, "uniform")

    def draw(self, row: int, generator: np.random.Generator) -> int:
        """The index of the prompt that a row is to play next."""
        return self.samplers[row].draw(generator, 1)[0]

    def reset(self, rows: Sequence[int], prompt_indices: Sequence[int]) -> TextState:
        """Starts new episodes in the given rows, from the prompts of the given indices."""
        return self.begin(rows, self.task.prompts.select(prompt_indices), prompt_indices)

    def begin(self, rows: Sequence[int], prompts: Prompts, prompt_indices: Sequence[int]) -> TextState:
        """Starts new episodes in the given rows, from prompts whose indices are -1 where they are not the task's.

        Where a mask goes wrong, the old episodes in these rows are over, and the rows may be started again.
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

    def action_mask(self) -> Tensor:
        """Which tokens may come next: bool [B, V], true in whole where no episode is running or no mask is set."""
        if self.masker is not None and self.masker.outdated():
            self.allowed = self._masks(self.masker, self.state, self.running)
        return self.allowed

    def step(self, tokens: Tensor, active: Tensor | None = None) -> Transition:
        """Writes one token in each active row (all rows unless told).

        tokens: int64 [B]; active: bool [B]. Raises ValueError for an id outside the vocabulary, for a row whose
        episode is over, and for a reward or a mask that goes wrong. Then nothing has changed: the step may be tried
        again.
        """
        active = torch.ones_like(self.running) if active is None else active
        self._check(tokens, active)
        reference_log_prob = self._reference_log_prob(tokens, active)
        state = self.state.append(tokens, active)
        code = finish(tokens, state.length, self.stop_token_ids, self.task.config.max_new_tokens)
        code = code.where(active, RUNNING)
        ended, running = code != RUNNING, self.running & (code == RUNNING)
        batches = self._batches(state, code, ended)
        given = [read_scores(self.task.reward, episodes) for _, episodes in batches]
        unfinished = self._batches(state, code, active & running) if self.token_members else []
        token_reward = self._token_reward(batches, given, unfinished)
        responses = {row: text for rows, one in batches for row, text in zip(rows.tolist(), one.responses, strict=True)}
        allowed = self._masks_after(state, running)
        # From here on nobody else's code is called, so that what raises leaves the step undone.
        self.state, self.running, self.allowed = state, running, allowed
        scores = self._paid(batches, given)
        self._tell_samplers(ended, scores.total)
        if self.reference is not None and bool(running.any()):
            self.reference.advance(state)
        reward = environment_reward(scores.final + token_reward, reference_log_prob, self.task.config.kl_coef)
        return Transition(state, reward, ended, code, reference_log_prob, scores.total, scores.parts, responses)

    def _check(self, tokens: Tensor, active: Tensor) -> None:
        bad = active & ((tokens < 0) | (tokens >= self.task.vocabulary))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"action {int(tokens[row])} in row {row} is no token id; ids go from 0 to "
                f"{self.task.vocabulary - 1} (the action space)."
            )
        over = active & ~self.running
        if bool(over.any()):
            raise ValueError(
                f"the episode in row {int(over.nonzero()[0])} is over or was never started; call reset() first."
            )

    def _tell_samplers(self, ended: Tensor, score: Tensor) -> None:
        for row in ended.nonzero()[:, 0].tolist():
            if self.episode_prompts[row].index >= 0:
                self.samplers[row].update([self.episode_prompts[row].index], [float(score[row])])

    def _masks(self, masker: Masker, state: TextState, rows: Tensor) -> Tensor:
        return masker.allowed(state, [one.text for one in self.episode_prompts], rows)

    def _masks_after(self, state: TextState, running: Tensor) -> Tensor:
        """Bool [B, V], once this state is reached."""
        if self.masker is None:
            return self.allowed
        # Reading ahead is no change: what a reader saw last is read again before a mask asks for it.
        if bool(running.any()):
            self.masker.advance(state)
        return self._masks(self.masker, state, running)

    def _reference_log_prob(self, tokens: Tensor, active: Tensor) -> Tensor:
        if self.reference is None:
            return torch.zeros(self.rows, device=self.task.device)
        tokens = tokens.where(active, 0)
        return chosen_log_probs(self.reference.logits, tokens, self.task.config.temperature).where(active, 0.0)

    def _batches(self, state: TextState, code: Tensor, chosen: Tensor) -> list[Batch]:
        """The rows of `chosen` (bool [B]) as rewards see them, apart where their prompts have other fields.

        The task's prompts have the same ones. Prompts of the caller's own may have others, and what a reward sees of
        a prompt must not depend on its neighbors.
        """
        groups: dict[frozenset[str], list[int]] = {}
        for row in chosen.nonzero()[:, 0].tolist():
            groups.setdefault(frozenset(self.episode_prompts[row].fields), []).append(row)
        return [self._batch(state, code, rows) for rows in groups.values()]

    def _batch(self, state: TextState, code: Tensor, rows: list[int]) -> Batch:
        index, played = torch.tensor(rows, device=code.device), [self.episode_prompts[row] for row in rows]
        fields = {name: [one.fields[name] for one in played] for name in played[0].fields}
        texts, stopped = [one.text for one in played], code[index] == STOP
        return index, ResponseBatch(texts, state.select(index), stopped, self.task.tokenizer, fields, rows)

    def _token_reward(self, ended: Sequence[Batch], given: Sequence[Scores], unfinished: Sequence[Batch]) -> Tensor:
        """What rewards of single tokens pay for the newest token of each row, float32 [B]."""
        paid = torch.zeros(self.rows, device=self.task.device)
        if self.token_members:
            for (rows, episodes), scores in zip(ended, given, strict=True):
                assert scores.tokens is not None
                paid[rows] = newest(scores.tokens, episodes.state)
            for rows, episodes in unfinished:
                paid[rows] = last_token_rewards(self.token_members, episodes)
        return paid

    def _paid(self, batches: Sequence[Batch], given: Sequence[Scores]) -> Scores:
        """Scores of all rows as they are paid: zero where the episode goes on."""
        if not batches:
            names = self.task.score_part_names
            zero, *parts = torch.zeros(1 + len(names), self.rows, device=self.task.device)
            return Scores(zero, dict(zip(names, parts, strict=True)))
        rows = torch.cat([rows for rows, _ in batches])
        scores = normalize(self.task.normalizer, concatenate(given))
        return Scores(
            final=self._spread(scores.final, rows),
            parts={name: self._spread(part, rows) for name, part in scores.parts.items()},
            tokens=None if scores.tokens is None else self._spread(scores.tokens, rows),
        )

    def _spread(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of these rows among zeros for the others: [b, ...] -> [B, ...]."""
        return values.new_zeros(self.rows, *values.shape[1:]).index_copy(0, rows, values)
