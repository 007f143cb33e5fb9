"""Python functions that pay a reward at every token.

`f(prompts: list[str], tokens: list[list[str]], **fields) -> list[list[float]]` under `@textenv.per_token`: one number
for each token of each response.

    @textenv.per_token
    def no_digits(prompts, tokens):
        return [[-float(token.strip().isdigit()) for token in response] for response in tokens]

`step` calls the function on the response so far and pays its last token; the fast path calls it once on the whole
response. The two agree if the reward of a token does not depend on later tokens, which conformance.py checks.
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
        """Call the undecorated function."""
        return self.function(*args, **kwargs)


def per_token(function: Callable[..., Any]) -> PerToken:
    """Decorate a reward function that pays every token.

    `f(prompts: list[str], tokens: list[list[str]], **fields) -> list[list[float]]`: one number for each token of each
    response. Number t may depend only on tokens 1 to t.
    """
    return PerToken(function)


class TokenFunctionReward:
    """A per-token function as a reward. Its part is the sum over the response."""

    def __init__(self, function: PerToken, name: str, *, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        self.part_names = (name,)
        self.fields = find_fields(function.function, name)
        self.texts: TokenTexts | None = None

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses: everything is paid per token, nothing at the end."""
        tokens = self.token_rewards(batch)
        total = tokens.sum(1)
        return Scores(torch.zeros_like(total), {self.name: total}, tokens)

    def token_rewards(self, batch: ResponseBatch) -> Tensor:
        """The reward of each token so far: float32 [B, R], zero where not generated."""
        if self.texts is None or self.texts.tokenizer is not batch.tokenizer:
            self.texts = TokenTexts(batch.tokenizer)
        tokens = [self.texts(ids) for ids in batch.response_ids]
        fields = self.fields.of(batch, self.name)
        prompts = list(batch.prompts)
        returned = call_batch(lambda: self.function(prompts, tokens, **fields), batch, self.name, self.timeout)
        return self._as_tensor(returned, batch)

    def _as_tensor(self, returned: Any, batch: ResponseBatch) -> Tensor:
        if not isinstance(returned, list | tuple) or len(returned) != len(batch):
            got = f"{len(returned)}" if isinstance(returned, list | tuple) else type(returned).__name__
            raise ValueError(
                f"reward {self.name!r} must return a list of {len(batch)} lists, one per response, got {got}."
            )
        mask = batch.state.response_mask.cpu()
        paid = torch.zeros(mask.shape)
        for index, (numbers, ids) in enumerate(zip(returned, batch.response_ids, strict=True)):
            paid[index, mask[index]] = self._as_row(numbers, len(ids), index, batch)
        return paid.to(batch.state.length.device)

    def _as_row(self, numbers: Any, expected: int, index: int, batch: ResponseBatch) -> Tensor:
        try:
            row = torch.as_tensor(numbers, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"reward {self.name!r} must return {expected} numbers, one per token, for "
                f"{batch.describe_row(index)}, got {str(numbers)[:80]!r}."
            ) from error
        if row.shape != (expected,):
            raise ValueError(
                f"reward {self.name!r} must return {expected} numbers, one per token, for "
                f"{batch.describe_row(index)}, got shape {tuple(row.shape)}."
            )
        if not bool(torch.isfinite(row).all()):
            token = int((~torch.isfinite(row)).nonzero()[0])
            raise ValueError(
                f"reward {self.name!r} returned {float(row[token])} for token {token} of {batch.describe_row(index)}; "
                "return a finite number for every token."
            )
        return row
