"""What a response is worth: the protocol of rewards, what they see, what they give, and weighted sums of them.

The kinds of rewards are elsewhere: models in reward_model.py, Python functions in functions.py and per_token.py.
From names to rewards: build.py.
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

SHOWN = 200  # characters of a prompt or response that an error message quotes


@dataclass(frozen=True)
class ResponseBatch:
    """Finished responses, as rewards see them: tokens, and texts decoded once, when asked for.

    Rewards that pay at every token see unfinished ones too, of which nothing has stopped.
    """

    prompts: list[str]
    state: TextState
    stopped: Tensor  # bool [B], true = ended with a stop token, false = cut by the budget
    tokenizer: PreTrainedTokenizerBase
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # the prompts' further fields, B values each
    rows: Sequence[int] | None = None  # which rows of the environment or the batch these are; None: 0 to B - 1

    @cached_property
    def texts(self) -> list[str]:
        """Prompt and response in one, without special tokens."""
        ids, mask = self.state.input_ids.cpu(), self.state.attention_mask.cpu()
        return [self._decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]

    @cached_property
    def responses(self) -> list[str]:
        """The generated part alone, without special tokens."""
        width = self.state.prompt_width
        ids, mask = self.state.input_ids[:, :width].cpu(), self.state.attention_mask[:, :width].cpu()
        # Cut from the decoded whole, since decoding the part alone would lose a leading space in some
        # tokenizers (SentencePiece).
        heads = [self._decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
        return [text[len(head) :] for text, head in zip(self.texts, heads, strict=True)]

    @cached_property
    def response_ids(self) -> list[list[int]]:
        """The generated token ids of each row, and nothing else."""
        ids, mask = self.state.response_ids.cpu(), self.state.response_mask.cpu()
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> int:
        """The row of the environment, or of the whole batch, that response number `index` is in."""
        return index if self.rows is None else self.rows[index]

    def where(self, index: int) -> str:
        """Response number `index`, for an error message."""
        prompt, response = _quote(self.prompts[index]), _quote(self.responses[index])
        return f"row {self.row(index)} (prompt {prompt}, response {response})"

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Scores:
    """What a reward gives for B responses."""

    final: Tensor  # float32 [B], paid at the last token
    parts: dict[str, Tensor]  # float32 [B] each: what every reward gave under its name, before its weight
    tokens: Tensor | None = None  # float32 [B, R], paid at each token, zero outside the response; None: nothing

    @property
    def total(self) -> Tensor:
        """The whole response's score: all that is paid for it. Float32 [B]."""
        return self.final if self.tokens is None else self.final + self.tokens.sum(1)


@runtime_checkable
class Reward(Protocol):
    """Scores finished responses, in batches. Any object with these three is taken by `textenv.shared(it)`.

    A response's scores may depend on nothing but the response, its prompt and the prompt's fields.
    """

    @property
    def name(self) -> str:
        """What messages and descriptions call it."""
        ...

    @property
    def part_names(self) -> Sequence[str]:
        """The keys of its `Scores.parts`; one reward by itself has one, its own name."""
        ...

    def __call__(self, episodes: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        ...


@runtime_checkable
class TokenReward(Reward, Protocol):
    """A reward that pays at every token, and so is also asked about unfinished responses."""

    def token_rewards(self, episodes: ResponseBatch) -> Tensor:
        """What each token so far is paid: float32 [B, R], zero outside the response.

        What token t is paid may depend on nothing after it.
        """
        ...


class WeightedSum:
    """The sum of several rewards, each times its weight. Its parts are theirs, before the weights."""

    def __init__(self, members: Sequence[tuple[float, Reward]]) -> None:
        self.members = tuple(members)
        self.name = " + ".join(f"{weight:g}·{reward.name}" for weight, reward in self.members)
        self.part_names = tuple(name for _, reward in self.members for name in reward.part_names)
        for name, times in Counter(self.part_names).items():
            if times > 1:
                raise ValueError(
                    f"{times} rewards of a sum are named {name!r}, so their parts could not be told apart; give each a "
                    "name of its own (for a function, its 'module:function' or its def)."
                )

    def __call__(self, episodes: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        scores = [(weight, read_scores(reward, episodes)) for weight, reward in self.members]
        tokens = [weight * one.tokens for weight, one in scores if one.tokens is not None]
        return Scores(
            final=torch.stack([weight * one.final for weight, one in scores]).sum(0),
            parts={name: part for _, one in scores for name, part in one.parts.items()},
            tokens=torch.stack(tokens).sum(0) if tokens else None,
        )


def read_scores(reward: Reward, episodes: ResponseBatch) -> Scores:
    """What a reward says of finished responses, checked: the one door by which scores come in.

    Raises ValueError that names the reward and, where a number is not finite, the prompt and the response.
    """
    given = reward(episodes)
    if not isinstance(given, Scores) or set(given.parts) != set(reward.part_names):
        got = f"parts {sorted(given.parts)}" if isinstance(given, Scores) else type(given).__name__
        raise ValueError(
            f"reward {reward.name!r} must return textenv.Scores with the parts that its part_names say "
            f"({sorted(reward.part_names)}), got {got}."
        )
    device, mask = episodes.state.input_ids.device, episodes.state.response_mask
    pays_tokens = bool(token_members(reward))
    if (given.tokens is not None) != pays_tokens:
        raise ValueError(
            f"reward {reward.name!r} {'gives no' if pays_tokens else 'gives'} Scores.tokens and "
            f"{'has a' if pays_tokens else 'has no'} method token_rewards: give both, or neither (textenv.per_token "
            "makes such a reward of a function)."
        )
    scores = Scores(
        final=_checked(given.final, (len(episodes),), reward.name, "final").to(device),
        parts={
            name: _checked(part, (len(episodes),), reward.name, f"part {name!r}").to(device)
            for name, part in given.parts.items()
        },
        tokens=None
        if given.tokens is None
        else _checked(given.tokens, tuple(mask.shape), reward.name, "tokens").to(device).where(mask, 0.0),
    )
    for numbers in (scores.total, *scores.parts.values()):
        refuse_unfinite(numbers, reward.name, episodes)
    return scores


def refuse_unfinite(numbers: Tensor, name: str, episodes: ResponseBatch) -> None:
    """Raises ValueError that names the reward, the prompt and the response of a number that is not finite.

    numbers: [B].
    """
    finite = torch.isfinite(numbers)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"reward {name!r} returned {float(numbers[index])} for {episodes.where(index)}; return a finite number for "
            "every response, the empty one too."
        )


def concatenate(scores: Sequence[Scores]) -> Scores:
    """Scores of one reward for several batches, as those of one."""
    tokens = [one.tokens for one in scores if one.tokens is not None]
    return Scores(
        final=torch.cat([one.final for one in scores]),
        parts={name: torch.cat([one.parts[name] for one in scores]) for name in scores[0].parts},
        tokens=torch.cat(tokens) if tokens else None,
    )


def token_members(reward: Reward) -> tuple[tuple[float, TokenReward], ...]:
    """The rewards that pay at every token, with their weights; empty where there is none, and steps cost nothing."""
    if isinstance(reward, WeightedSum):
        return tuple((weight * inner, one) for weight, member in reward.members for inner, one in token_members(member))
    return ((1.0, reward),) if isinstance(reward, TokenReward) else ()


def newest(tokens: Tensor, state: TextState) -> Tensor:
    """What stands at the last token of each response: [B, R] -> [B]."""
    return tokens.gather(1, state.length[:, None] - 1)[:, 0]


def last_token_rewards(members: Sequence[tuple[float, TokenReward]], episodes: ResponseBatch) -> Tensor:
    """What the last token of each unfinished response is paid, float32 [B]."""
    device = episodes.state.length.device
    paid = torch.zeros(len(episodes), device=device)
    for weight, reward in members:
        tokens = _checked(
            reward.token_rewards(episodes), tuple(episodes.state.response_mask.shape), reward.name, "token rewards"
        )
        own = newest(tokens.to(device), episodes.state)  # [B]
        refuse_unfinite(own, reward.name, episodes)
        paid = paid + weight * own
    return paid


def _checked(numbers: Any, shape: tuple[int, ...], name: str, what: str) -> Tensor:
    if not isinstance(numbers, Tensor) or tuple(numbers.shape) != shape:
        got = tuple(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(f"reward {name!r} must give {what} as a tensor of shape {shape}, got {got}.")
    return numbers.detach().float()


def _quote(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."
