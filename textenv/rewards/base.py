"""The reward protocol: the batch that a reward sees, the scores that it returns, and weighted sums of rewards.

Reward models are in reward_model.py, Python functions in functions.py and per_token.py. build.py turns the `reward`
setting into a reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textenv.state import TextState

QUOTED_CHARACTERS = 200  # of a prompt or response in an error message


@dataclass(frozen=True)
class ResponseBatch:
    """B finished responses, as rewards see them: token ids, and texts that are decoded once, on first use.

    A reward that pays at every token also sees unfinished responses; `stopped` is false for them.
    """

    prompts: list[str]
    state: TextState
    stopped: Tensor  # bool [B], true = ended with a stop token, false = cut by the budget
    tokenizer: PreTrainedTokenizerBase
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # the other fields of the prompts, B values each
    rows: Sequence[int] | None = None  # their rows in the environment; None is 0 to B - 1
    tokens_per_pass: int | None = None  # read by a model in one forward, see `in_batches`

    @cached_property
    def ids(self) -> list[list[int]]:
        """The token ids of each prompt and its response, without padding."""
        return _token_lists(self.state.input_ids, self.state.attention_mask)

    @cached_property
    def texts(self) -> list[str]:
        """Prompt and response as one text, without special tokens."""
        return [self._decode(ids) for ids in self.ids]

    @cached_property
    def responses(self) -> list[str]:
        """The responses alone, without special tokens."""
        width = self.state.prompt_width
        prompts = _token_lists(self.state.input_ids[:, :width], self.state.attention_mask[:, :width])
        # Cut from the whole decoded text, since some tokenizers (SentencePiece) drop a leading space when the
        # response is decoded alone.
        return [text[len(self._decode(prompt)) :] for text, prompt in zip(self.texts, prompts, strict=True)]

    @cached_property
    def response_ids(self) -> list[list[int]]:
        """The generated token ids of each response, without padding."""
        return _token_lists(self.state.response_ids, self.state.response_mask)

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> int:
        """The row of response `index` in the environment, or in this batch."""
        return index if self.rows is None else self.rows[index]

    def describe_row(self, index: int) -> str:
        """Row, prompt and response of response `index`, for an error message."""
        prompt, response = _quote(self.prompts[index]), _quote(self.responses[index])
        return f"row {self.row(index)} (prompt {prompt}, response {response})"

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Scores:
    """The scores of B responses under one reward."""

    final: Tensor  # float32 [B], paid at the last token
    parts: dict[str, Tensor]  # float32 [B] each, by reward name: the score of each reward, before its weight
    tokens: Tensor | None = None  # float32 [B, R], paid at each token, zero where not generated; None pays nothing

    @property
    def total(self) -> Tensor:
        """The score of the whole response, the sum of everything paid for it. Float32 [B]."""
        return self.final if self.tokens is None else self.final + self.tokens.sum(1)


@runtime_checkable
class Reward(Protocol):
    """Scores batches of finished responses. `textenv.shared(reward)` passes any object with these members.

    A response's scores may depend only on the response, its prompt and the prompt's fields.
    """

    @property
    def name(self) -> str:
        """The name in error messages and descriptions."""
        ...

    @property
    def part_names(self) -> Sequence[str]:
        """The keys of `Scores.parts`. A reward that is not a sum usually has one, its own name."""
        ...

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        ...


@runtime_checkable
class TokenReward(Reward, Protocol):
    """A reward that pays at every token, and so is also called on unfinished responses."""

    def token_rewards(self, batch: ResponseBatch) -> Tensor:
        """The reward of each token so far: float32 [B, R], zero where not generated.

        The reward of token t must not depend on later tokens.
        """
        ...


class WeightedSum:
    """A weighted sum of rewards. Its parts are the parts of its members, before the weights."""

    def __init__(self, members: Sequence[tuple[float, Reward]]) -> None:
        self.members = tuple(members)
        self.name = " + ".join(f"{weight:g}·{reward.name}" for weight, reward in self.members)
        self.part_names = tuple(name for _, reward in self.members for name in reward.part_names)
        for name, count in Counter(self.part_names).items():
            if count > 1:
                raise ValueError(
                    f"{count} rewards of a sum are named {name!r}, so their parts could not be told apart; give each "
                    "its own name (a function is named by its 'module:function' or its def)."
                )

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        weighted = [(weight, read_scores(reward, batch)) for weight, reward in self.members]
        tokens = [weight * scores.tokens for weight, scores in weighted if scores.tokens is not None]
        return Scores(
            final=torch.stack([weight * scores.final for weight, scores in weighted]).sum(0),
            parts={name: part for _, scores in weighted for name, part in scores.parts.items()},
            tokens=torch.stack(tokens).sum(0) if tokens else None,
        )


def read_scores(reward: Reward, batch: ResponseBatch) -> Scores:
    """Call a reward on finished responses and check its scores. All scores enter the environment here.

    Raises ValueError that names the reward and, for a number that is not finite, the prompt and the response.
    """
    returned = reward(batch)
    if not isinstance(returned, Scores) or set(returned.parts) != set(reward.part_names):
        got = f"parts {sorted(returned.parts)}" if isinstance(returned, Scores) else type(returned).__name__
        raise ValueError(
            f"reward {reward.name!r} must return textenv.Scores with the parts listed in its part_names "
            f"({sorted(reward.part_names)}), got {got}."
        )
    device, mask = batch.state.input_ids.device, batch.state.response_mask
    pays_tokens = bool(token_members(reward))
    if (returned.tokens is not None) != pays_tokens:
        raise ValueError(
            f"reward {reward.name!r} returns {'no ' if pays_tokens else ''}Scores.tokens and "
            f"has {'a' if pays_tokens else 'no'} method token_rewards; provide both or neither (textenv.per_token "
            "turns a function into such a reward)."
        )
    scores = Scores(
        final=_checked(returned.final, (len(batch),), reward.name, "final").to(device),
        parts={
            name: _checked(part, (len(batch),), reward.name, f"part {name!r}").to(device)
            for name, part in returned.parts.items()
        },
        tokens=None
        if returned.tokens is None
        else _checked(returned.tokens, tuple(mask.shape), reward.name, "tokens").to(device).where(mask, 0.0),
    )
    check_finite(torch.stack([scores.total, *scores.parts.values()]), reward.name, batch)
    return scores


def check_finite(numbers: Tensor, name: str, batch: ResponseBatch) -> None:
    """Raise ValueError for the first number that is not finite; names the reward, the prompt and the response.

    numbers: [..., B].
    """
    finite = torch.isfinite(numbers)
    if not bool(finite.all()):
        place = tuple((~finite).nonzero()[0].tolist())
        index = place[-1]
        raise ValueError(
            f"reward {name!r} returned {float(numbers[place])} for {batch.describe_row(index)}; return a finite number "
            "for every response, including the empty one."
        )


def concatenate(scores: Sequence[Scores]) -> Scores:
    """Concatenate the scores of one reward over several batches, along the rows."""
    tokens = [part.tokens for part in scores if part.tokens is not None]
    return Scores(
        final=torch.cat([part.final for part in scores]),
        parts={name: torch.cat([part.parts[name] for part in scores]) for name in scores[0].parts},
        tokens=torch.cat(tokens) if tokens else None,
    )


def token_members(reward: Reward) -> tuple[tuple[float, TokenReward], ...]:
    """The rewards that pay at every token, with their weights. Without any, steps compute no rewards before the end."""
    if isinstance(reward, WeightedSum):
        return tuple(
            (weight * inner_weight, inner)
            for weight, member in reward.members
            for inner_weight, inner in token_members(member)
        )
    return ((1.0, reward),) if isinstance(reward, TokenReward) else ()


def newest(tokens: Tensor, state: TextState) -> Tensor:
    """The value at the last generated token of each response. tokens: [B, R]. Returns [B]."""
    return tokens.where(state.last_generated, 0.0).sum(1)


def last_token_rewards(members: Sequence[tuple[float, TokenReward]], batch: ResponseBatch) -> Tensor:
    """The reward of the last token of each unfinished response, float32 [B]."""
    device = batch.state.length.device
    paid = torch.zeros(len(batch), device=device)
    for weight, reward in members:
        tokens = _checked(
            reward.token_rewards(batch), tuple(batch.state.response_mask.shape), reward.name, "token rewards"
        )
        last = newest(tokens.to(device), batch.state)  # [B]
        check_finite(last, reward.name, batch)
        paid = paid + weight * last
    return paid


def _checked(numbers: Any, shape: tuple[int, ...], name: str, what: str) -> Tensor:
    if not isinstance(numbers, Tensor) or tuple(numbers.shape) != shape:
        got = tuple(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(f"reward {name!r} must return {what} as a tensor of shape {shape}, got {got}.")
    return numbers.detach().float()


def _token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row at the true places of the mask. ids, mask: [B, T]."""
    return [row[real].tolist() for row, real in zip(ids.cpu().numpy(), mask.cpu().numpy(), strict=True)]


def _quote(text: str) -> str:
    return repr(text) if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]!r}..."
