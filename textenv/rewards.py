"""What a finished response is worth: the protocol, Python functions, and weighted sums.

Reward models are in reward_model.py. A reward sees finished responses only, in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textenv.state import TextState


@dataclass(frozen=True)
class Episodes:
    """Finished responses, as rewards see them: tokens, and texts decoded once, when asked for."""

    prompts: list[str]
    state: TextState
    stopped: Tensor  # bool [B], true = ended with a stop token, false = cut by the budget
    tokenizer: PreTrainedTokenizerBase

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

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Reward(Protocol):
    """One number for each finished response."""

    name: str

    def __call__(self, episodes: Episodes) -> Tensor:
        """Scores, float32 [B]."""
        ...


class FunctionReward:
    """A Python function `f(prompts: list[str], responses: list[str]) -> list[float]` as a reward."""

    def __init__(self, function: Callable[[list[str], list[str]], Sequence[float]], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, episodes: Episodes) -> Tensor:
        """Scores, float32 [B]. Refuses what is not one finite number a response."""
        prompts, responses = episodes.prompts, episodes.responses
        returned = self.function(list(prompts), list(responses))
        scores = _as_numbers(returned, self.name, len(responses))
        for row, score in enumerate(scores.tolist()):
            if not torch.isfinite(scores[row]):
                raise ValueError(
                    f"reward {self.name!r} returned {score} for row {row} (prompt {prompts[row]!r}, response "
                    f"{responses[row]!r}); return a finite number for every response, the empty one too."
                )
        return scores.to(episodes.state.input_ids.device)


class WeightedSum:
    """The sum of several rewards, each times its weight."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self.parts = tuple(parts)
        self.name = " + ".join(f"{weight:g}·{reward.name}" for weight, reward in self.parts)

    def __call__(self, episodes: Episodes) -> Tensor:
        """Scores, float32 [B]."""
        return torch.stack([weight * reward(episodes) for weight, reward in self.parts]).sum(0)


def _as_numbers(returned: Sequence[float], name: str, expected: int) -> Tensor:
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward {name!r} must return a list of {expected} numbers, got {type(returned).__name__}: "
            f"{str(returned)[:80]!r}."
        ) from error
    if scores.shape != (expected,):
        raise ValueError(
            f"reward {name!r} must return one number a response, {expected} in all, got shape "
            f"{tuple(scores.shape)}; return a flat list as long as `responses`."
        )
    return scores
