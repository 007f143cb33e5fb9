"""The decision process, in batched tensors on one device: the only stepping code there is.

Here episodes end and rewards are paid, one token a row at a time; the faces (env.py, vector_env.py,
torchrl_env.py) hold no logic of their own, and the fast path (generation.py) gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textenv.kl import environment_reward
from textenv.language_model import Reader
from textenv.masks import Masker
from textenv.prompts import Prompts
from textenv.rewards import Episodes, Scores, last_token_rewards, read_scores, token_members
from textenv.sampling import chosen_log_probs
from textenv.score_normalisation import normalise
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


class TextDynamics:
    """B episodes side by side. Rows may be at different places, and start anew at different times."""

    def __init__(self, task: Task, rows: int) -> None:
        self.task, self.rows = task, rows
        self.prompt_texts = [""] * rows
        self.token_members = token_members(task.reward)
        self.prompt_index = [-1] * rows  # which of the task's prompts each row plays; -1 is one from elsewhere
        self.prompt_columns: list[dict[str, Any]] = [{} for _ in range(rows)]  # the further fields of that prompt
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
        self.reference = None if task.reference is None else Reader(task.reference.model, *shape)
        self.masker = Masker(task.masks, task.stop_token_ids, shape) if task.masks else None

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
        """Starts new episodes in the given rows, from prompts whose indices are -1 where they are not the task's."""
        for place, (row, index) in enumerate(zip(rows, prompt_indices, strict=True)):
            self.prompt_texts[row], self.prompt_index[row] = prompts.texts[place], index
            self.prompt_columns[row] = {name: values[place] for name, values in prompts.columns.items()}
        index = torch.tensor(list(rows), dtype=torch.long, device=self.task.device)
        budget = self.task.config.max_new_tokens
        fresh = start(prompts.input_ids, prompts.attention_mask, budget, self.task.pad_token_id)
        self.state = self.state.restart(index, fresh)
        self.running[index] = True
        if self.reference is not None:
            self.reference.restart(fresh, index)
        if self.masker is not None:
            self.masker.restart(self.state, index)
        return self.state

    def action_mask(self) -> Tensor:
        """Which tokens may come next: bool [B, V], true in whole where no episode is running or no mask is set."""
        if self.masker is None:
            return torch.ones(self.rows, self.task.vocabulary, dtype=torch.bool, device=self.task.device)
        return self.masker.allowed(self.state, self.prompt_texts, self.running)

    def step(self, tokens: Tensor, active: Tensor | None = None) -> Transition:
        """Writes one token in each active row (all rows unless told).

        tokens: int64 [B]; active: bool [B]. Raises ValueError for an id outside the vocabulary, for a row whose
        episode is over, and for a reward that goes wrong. Then nothing has changed: the step may be tried again.
        """
        active = torch.ones_like(self.running) if active is None else active
        self._check(tokens, active)
        reference_log_prob = self._reference_log_prob(tokens, active)
        state = self.state.append(tokens, active)
        code = finish(tokens, state.length, self.stop_token_ids, self.task.config.max_new_tokens)
        code = code.where(active, RUNNING)
        ended = code != RUNNING
        scores, responses = self._score(state, code)
        token_reward = self._token_reward(state, active & ~ended, scores)
        # From here on no reward is called, so that one that raises leaves the step undone.
        self.state, self.running = state, self.running & ~ended
        self._tell_samplers(ended, scores.total)
        if bool(self.running.any()):
            self._read()
        reward = environment_reward(scores.final, ended, reference_log_prob, self.task.config.kl_coef) + token_reward
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
            if self.prompt_index[row] >= 0:
                self.samplers[row].update([self.prompt_index[row]], [float(score[row])])

    def _read(self) -> None:
        if self.reference is not None:
            self.reference.advance(self.state)
        if self.masker is not None:
            self.masker.advance(self.state)

    def _reference_log_prob(self, tokens: Tensor, active: Tensor) -> Tensor:
        if self.reference is None:
            return torch.zeros(self.rows, device=self.task.device)
        tokens = tokens.where(active, 0)
        return chosen_log_probs(self.reference.logits, tokens, self.task.config.temperature).where(active, 0.0)

    def _score(self, state: TextState, code: Tensor) -> tuple[Scores, dict[int, str]]:
        """Scores as they are paid and texts of the rows that ended; the scores of all other rows are zero."""
        rows = (code != RUNNING).nonzero()[:, 0]
        if not len(rows):
            names = self.task.score_part_names
            zero, *parts = torch.zeros(1 + len(names), self.rows, device=code.device)
            return Scores(zero, dict(zip(names, parts, strict=True))), {}
        episodes = self._episodes(state, rows, code)
        scores = normalise(self.task.normaliser, read_scores(self.task.reward, episodes))
        whole = Scores(
            final=self._spread(scores.final, rows),
            parts={name: self._spread(part, rows) for name, part in scores.parts.items()},
            tokens=None if scores.tokens is None else self._spread(scores.tokens, rows),
        )
        return whole, dict(zip(rows.tolist(), episodes.responses, strict=True))

    def _token_reward(self, state: TextState, going_on: Tensor, scores: Scores) -> Tensor:
        """What rewards of single tokens pay for the newest token of each row, float32 [B]."""
        paid = torch.zeros(self.rows, device=going_on.device)
        if scores.tokens is not None:
            paid = scores.tokens.gather(1, (state.length[:, None] - 1).clamp_min(0))[:, 0]
        if self.token_members and bool(going_on.any()):
            rows = going_on.nonzero()[:, 0]
            unfinished = self._episodes(state, rows, torch.full_like(going_on, RUNNING, dtype=torch.long))
            paid[rows] = last_token_rewards(self.token_members, unfinished)
        return paid

    def _episodes(self, state: TextState, rows: Tensor, code: Tensor) -> Episodes:
        return Episodes(
            [self.prompt_texts[row] for row in rows.tolist()],
            state.select(rows),
            code[rows] == STOP,
            self.task.tokenizer,
            columns=self._columns(rows.tolist()),
            rows=rows.tolist(),
        )

    def _columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The further fields of the prompts in these rows, as far as all of them have them."""
        fields = [self.prompt_columns[row] for row in rows]
        names = [name for name in fields[0] if all(name in field for field in fields)]
        return {name: [field[name] for field in fields] for name in names}

    def _spread(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of these rows among zeros for the others: [b, ...] -> [B, ...]."""
        return values.new_zeros(self.rows, *values.shape[1:]).index_copy(0, rows, values)
