"""The fast path: whole responses at once, then one teacher-forced pass of each frozen model.

`generate` samples responses from any language model, one cached token at a time. `score_responses` computes the
reference log-probabilities, scores and rewards of finished responses. The numbers equal those of stepping through
dynamics.py, at a fraction of the cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.kl import FiniteCheck, check_finite_steps, environment_reward, exact_kl
from textenv.masks.masks import Masker
from textenv.masks.token_sets import TokenSets
from textenv.models.decoding import Decoding, new_decoder
from textenv.models.logits import log_probs_at, map_states, read_logits, spread
from textenv.models.sampling import Sampling, sample
from textenv.prompts.tokenized import Prompts
from textenv.rewards.base import ResponseBatch, Scores, read_scores
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

FEWEST_SLOTS = 8  # slots are not dropped below this number: fewer would hardly be faster


@dataclass(frozen=True)
class Generation:
    """Finished responses and the log-probabilities under which they were sampled."""

    state: TextState
    log_prob: Tensor  # float32 [B, R], after action masks; zero at tokens not generated
    allowed: TokenSets | None  # [B, R], the tokens that the action masks allowed; None without masks


@dataclass(frozen=True)
class Readings:
    """What the reward and the reference say of B finished responses, before normalization."""

    raw: Scores
    reference_log_prob: Tensor  # float32 [B, R], zero at tokens not generated, and without a reference
    finish_code: Tensor  # int64 [B], STOP or LENGTH
    batch: ResponseBatch  # what the reward saw


@dataclass(frozen=True)
class ScoredResponses:
    """Scores and rewards of B finished responses."""

    reward: Tensor  # float32 [B, R], the environment's reward at each token
    token_score: Tensor  # float32 [B, R], the part of `reward` that is score; `reward` adds β · reference_log_prob
    reference_log_prob: Tensor  # float32 [B, R], zero at tokens not generated, and without a reference
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
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    chance: torch.Generator | Tensor,
    decoding: Decoding | None = None,
) -> Generation:
    """Sample one response to each prompt from `model`.

    Random numbers are drawn for every row and token beforehand, so a row's tokens depend on its own numbers alone: not
    on which rows are decoded beside it, on `decoding`, or on when others end. Identical prompts that follow one another
    are read once.
    chance: a generator, or its numbers, as from `random_numbers`.
    """
    uniform = chance if isinstance(chance, Tensor) else random_numbers(task, len(prompts), chance)
    decoding = decoding or Decoding()
    look_every = decoding.look_every or (1 if task.device.type == "cpu" else 8)  # nothing waits for a CPU
    writing = _Writing(task, model, prompts, (sampling, uniform), decoding)
    steps = 0
    while True:
        writing.write()
        steps += 1
        if (steps % look_every == 0 or steps == writing.end) and not writing.look(steps):
            return writing.generation()
        writing.advance()


def random_numbers(task: Task, rows: int, generator: torch.Generator) -> Tensor:
    """The random numbers of as many responses, float64 [rows, R]."""
    shape = rows, task.config.max_new_tokens
    return torch.rand(shape, dtype=torch.float64, device=task.device, generator=generator)


class _Writing:
    """Responses while they are written: b slots, each of which holds one of the N rows of the result.

    Between two looks the host only launches: shapes are fixed, and a finished slot repeats its last step into nothing.
    At a look the host learns which slots have finished. Waiting rows take their places; when none waits, the rest is
    moved together, to a power of two of slots.
    """

    def __init__(
        self,
        task: Task,
        model: PreTrainedModel,
        prompts: Prompts,
        chance: tuple[Sampling, Tensor],
        decoding: Decoding,
    ) -> None:
        self.texts, self.budget = prompts.texts, task.config.max_new_tokens
        self.sampling, self.uniform = chance  # float64 [N, R]
        count, slots = len(prompts), min(decoding.slots or len(prompts), len(prompts))
        self.stops = torch.tensor(task.stop_token_ids, device=task.device)
        self.whole = start(prompts.input_ids, prompts.attention_mask, self.budget, task.pad_token_id)  # [N]
        self.log_prob = torch.zeros(count + 1, self.budget, device=task.device)  # [N + 1, R]; the last row is waste
        self.waiting = deque(range(slots, count))  # rows that have no slot yet
        self.rows = list(range(slots))  # [b], the row in each slot
        self.row = torch.arange(slots, device=task.device)  # [b], the same on the device
        self.state = self.whole.select(self.row)
        self.running = torch.ones(slots, dtype=torch.bool, device=task.device)
        self.end = self.budget  # the step after which no slot can be running
        shape = (slots, self.state.input_ids.shape[1], task.vocabulary)
        self.decoder = new_decoder(model, *shape, compile=decoding.compile)
        self.masker = Masker(task.masks, self.stops, shape) if task.masks else None
        self.finite = FiniteCheck() if self.masker is None else self.masker.finite
        self.masks: list[tuple[tuple[Tensor, Tensor], Tensor]] = []  # since the last look: places, and what was allowed
        self.sets: list[tuple[tuple[Tensor, Tensor], TokenSets]] = []
        self._start(self.row)

    def write(self) -> None:
        """Append one token to every running slot."""
        logits, length = self.decoder.logits, self.state.length  # [b, V], [b]
        step = length.clamp_max(self.budget - 1)
        place = self.row.where(self.running, len(self.texts)), step  # where the results go
        if self.masker is not None:
            allowed = self.masker.allowed(self.state, [self.texts[row] for row in self.rows], self.running)  # [b, V]
            self.masks.append((place, allowed))
            logits = logits.masked_fill(~allowed, -torch.inf)
        self.finite.note("the largest of the policy's logits", logits.amax(-1), self.running, length)
        tokens, log_prob = sample(logits, self.sampling, self.uniform[self.row, step])
        self.log_prob[place] = log_prob
        self.state = self.state.append(tokens, self.running)
        self.running = self.running & (finish(tokens, self.state.length, self.stops, self.budget) == RUNNING)

    def advance(self) -> None:
        """Read the new tokens."""
        self.decoder.advance(self.state)
        if self.masker is not None:
            self.masker.advance(self.state)

    def look(self, steps: int) -> bool:
        """Wait for the device, and fill or drop finished slots. Returns whether any slot is running.

        steps: taken so far. Raises ValueError for logits that no token can be sampled from.
        """
        *running, failed = torch.cat([self.running, self.finite.failed()]).tolist()
        if failed:
            raise self.finite.error(self.rows)
        self.finite.notes.clear()
        self._store_masks()
        done = [slot for slot, runs in enumerate(running) if not runs]
        if self.waiting and done:
            refilled = done[: len(self.waiting)]
            self._refill(refilled)
            self.end = steps + self.budget
            done = done[len(refilled) :]
        going_on = len(running) - len(done)
        size = max(1 << max(going_on - 1, 0).bit_length(), FEWEST_SLOTS)
        if going_on and size < len(running):
            self._drop(done[: len(running) - size])
        return going_on > 0

    def generation(self) -> Generation:
        """The result, when no slot is running."""
        self._collect(torch.arange(len(self.rows), device=self.row.device))
        count = len(self.texts)
        allowed = TokenSets.collect(self.sets, (count + 1, self.budget)) if self.masker else None
        if allowed is not None:
            allowed = TokenSets(allowed.ids[:count], allowed.inside[:count])
        return Generation(self.whole, self.log_prob[:count], allowed)

    def _start(self, slots: Tensor) -> None:
        """Read the prompts in these slots."""
        self.decoder.restart(self.state.select(slots), slots)
        if self.masker is not None:
            self.masker.restart(self.state, slots)

    def _refill(self, slots: list[int]) -> None:
        """Put the next waiting rows into finished slots."""
        index = torch.tensor(slots, device=self.row.device)
        self._collect(index)
        for slot in slots:
            self.rows[slot] = self.waiting.popleft()
        self.row = torch.tensor(self.rows, device=self.row.device)
        self.state = self.state.restart(index, self.whole.select(self.row[index]))
        self.running = self.running.index_fill(0, index, True)
        self._start(index)

    def _drop(self, slots: list[int]) -> None:
        """Go on without these finished slots."""
        self._collect(torch.tensor(slots, device=self.row.device))
        kept = sorted(set(range(len(self.rows))) - set(slots))
        index = torch.tensor(kept, device=self.row.device)
        self.rows = [self.rows[slot] for slot in kept]
        self.row, self.running, self.state = self.row[index], self.running[index], self.state.select(index)
        for each in [self.decoder] if self.masker is None else [self.decoder, self.masker]:
            each.keep(index)

    def _collect(self, slots: Tensor) -> None:
        """Copy the texts in these slots into the result."""
        self.whole = self.whole.restart(self.row[slots], self.state.select(slots))

    def _store_masks(self) -> None:
        """Store the masks since the last look in their compact form, whose width the host has to ask for."""
        if self.masks:
            width = int(torch.stack([TokenSets.stored_sizes(allowed) for _, allowed in self.masks]).max())
            self.sets += [(place, TokenSets.of(allowed, width)) for place, allowed in self.masks]
            self.masks.clear()


def score_responses(
    task: Task,
    state: TextState,
    prompt_texts: Sequence[str],
    tokens_per_pass: int | None = None,
    fields: Mapping[str, Sequence[Any]] | None = None,
) -> ScoredResponses:
    """Scores and rewards of finished responses: `read_responses`, then `pay`."""
    return pay(task, read_responses(task, state, prompt_texts, tokens_per_pass, fields))


@own_settings()
def read_responses(
    task: Task,
    state: TextState,
    prompt_texts: Sequence[str],
    tokens_per_pass: int | None = None,
    fields: Mapping[str, Sequence[Any]] | None = None,
) -> Readings:
    """What the reward and the reference say of finished responses.

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
    raw = read_scores(task.reward, batch)
    mask = state.response_mask  # [B, R]
    if task.reference is None:
        reference_log_prob = torch.zeros(mask.shape, device=mask.device)
    else:
        reference_log_prob = _log_probs(task.reference.model, state, task.config.temperature, tokens_per_pass)
        check_finite_steps(reference_log_prob, "the reference's log-probability")
    return Readings(raw, reference_log_prob, code, batch)


@own_settings()
def pay(task: Task, readings: Readings) -> ScoredResponses:
    """The rewards of responses that have been read. Running statistics see all their scores at once."""
    raw, reference_log_prob, state = readings.raw, readings.reference_log_prob, readings.batch.state
    scores = raw if task.normalizer is None else task.normalizer(raw)
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
        finish_code=readings.finish_code,
        batch=readings.batch,
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
