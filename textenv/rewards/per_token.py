"""Python functions that pay every token.

Stepping asks about the response so far and pays the newest token; the fast path asks once about the whole response.
The two agree where a token's pay depends on nothing after it, which conformance.py checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textenv.models.token_texts import TokenTexts
from textenv.rewards.base import ResponseBatch, Scores
from textenv.rewards.functions import call_batch, find_fields


@dataclass(frozen=True)
class PerToken:
    """A function `f(prompts: list[str], tokens: list[list[str]], **fields) -> list[list[float]]`."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, as it was written."""
        return self.function(*args, **kwargs)


def per_token(function: Callable[..., Any]) -> PerToken:
    """A decorator for a reward function that pays every token.

    `f(prompts: list[str], tokens: list[list[str]], **fields) -> list[list[float]]`: one number a token of each
    response; the t-th may depend on the tokens up to the t-th only.
    """
    return PerToken(function)


class TokenFunctionReward:
    """A function of tokens as a reward. Its part is the sum over the response."""

    def __init__(self, function: PerToken, name: str, *, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        self.part_names = (name,)
        self.fields = find_fields(function.function, name)
        self.texts: TokenTexts | None = None

    def __call__(self, episodes: ResponseBatch) -> Scores:
        """Scores of B finished responses: nothing at the end, all of it by the token."""
        tokens = self.token_rewards(episodes)
        total = tokens.sum(1)
        return Scores(torch.zeros_like(total), {self.name: total}, tokens)

    def token_rewards(self, episodes: ResponseBatch) -> Tensor:
        """What each token so far is paid: float32 [B, R], zero outside the response."""
        if self.texts is None or self.texts.tokenizer is not episodes.tokenizer:
            self.texts = TokenTexts(episodes.tokenizer)
        tokens = [self.texts(ids) for ids in episodes.response_ids]
        fields = self.fields.of(episodes, self.name)
        prompts = list(episodes.prompts)
        returned = call_batch(lambda: self.function(prompts, tokens, **fields), episodes, self.name, self.timeout)
        return self._as_tensor(returned, episodes)

    def _as_tensor(self, returned: Any, episodes: ResponseBatch) -> Tensor:
        if not isinstance(returned, list | tuple) or len(returned) != len(episodes):
            got = f"{len(returned)}" if isinstance(returned, list | tuple) else type(returned).__name__
            raise ValueError(
                f"reward {self.name!r} must return a list of {len(episodes)} lists, one a response, got {got}."
            )
        mask = episodes.state.response_mask.cpu()
        paid = torch.zeros(mask.shape)
        for index, (numbers, ids) in enumerate(zip(returned, episodes.response_ids, strict=True)):
            paid[index, mask[index]] = self._row(numbers, len(ids), index, episodes)
        return paid.to(episodes.state.length.device)

    def _row(self, numbers: Any, expected: int, index: int, episodes: ResponseBatch) -> Tensor:
        try:
            row = torch.as_tensor(numbers, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"reward {self.name!r} must return {expected} numbers, one a token, for {episodes.where(index)}, got "
                f"{str(numbers)[:80]!r}."
            ) from error
        if row.shape != (expected,):
            raise ValueError(
                f"reward {self.name!r} must return {expected} numbers, one a token, for {episodes.where(index)}, got "
                f"shape {tuple(row.shape)}."
            )
        if not bool(torch.isfinite(row).all()):
            token = int((~torch.isfinite(row)).nonzero()[0])
            raise ValueError(
                f"reward {self.name!r} returned {float(row[token])} for token {token} of {episodes.where(index)}; "
                "return a finite number for every token."
            )
        return row
