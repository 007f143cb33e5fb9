"""Action masks: which tokens may come next. How rollouts remember it is in token_sets.py.

A mask is advice to whoever samples. The environment shows it and takes any token all the same, so that clients
that know no masks still work; the fast path and our learners obey it. Masks never change the reward: the
reference's log-probability is that of its whole distribution, and so stays finite for every token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import regex
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.models.language_model import CachedDecoder
from textenv.models.sampling import Sampling, log_probs
from textenv.models.token_texts import TokenTexts
from textenv.rewards.calling import describe
from textenv.state import TextState


@dataclass(frozen=True)
class Contexts:
    """The texts that a mask is asked about."""

    prompts: Sequence[str]
    state: TextState  # b rows
    logits: Tensor | None  # float32 [b, V] of the mask's own model, where it has one

    def responses(self) -> list[list[int]]:
        """Token ids written so far, row by row."""
        ids, lengths = self.state.response_ids.tolist(), self.state.length.tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]


class TokenMask(Protocol):
    """Says which tokens may come next."""

    name: str

    @property
    def model(self) -> PreTrainedModel | None:
        """A language model to be read along, if the mask needs one."""
        ...

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V], or [V] for all rows alike; true = may come next."""
        ...


class NoSpecialTokens:
    """Forbids special tokens (save those that end a response) and ids that the tokenizer never writes."""

    name, model = "special", None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], vocabulary: int) -> None:
        written = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        self.ids = _listed([[one for one in written | set(stop_token_ids) if one < vocabulary]], vocabulary)[0]

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [V]."""
        return self.ids.to(contexts.state.length.device)


class MaskPolicy:
    """Keeps the likeliest tokens of a language model of its own: the mask of NLPO (Ramamurthy et al. 2023).

    It starts as the reference. Whoever trains hands it the actor from time to time, by `refresh`.
    """

    def __init__(self, model: PreTrainedModel, keep: Sampling) -> None:
        self.model: PreTrainedModel | None = model
        self.keep = keep
        self.name = f"top_k:{keep.top_k}" if keep.top_k else f"top_p:{keep.top_p:g}"

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        assert contexts.logits is not None
        return log_probs(contexts.logits, self.keep).isfinite()

    def refresh(self, model: PreTrainedModel) -> None:
        """Takes a frozen copy of a model as the mask's own from now on."""
        self.model = copy.deepcopy(model).requires_grad_(False).eval()


class AllowedIds:
    """A user's function `f(prompt: str, response_ids: list[int]) -> allowed ids`: a grammar, a lexicon.

    The idea of `prefix_allowed_tokens_fn` in Transformers' `generate`.
    """

    model = None

    def __init__(self, function: Callable[[str, list[int]], Iterable[int]], name: str, vocabulary: int) -> None:
        self.function, self.name, self.vocabulary = function, name, vocabulary

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        rows = [
            self._checked(prompt, response)
            for prompt, response in zip(contexts.prompts, contexts.responses(), strict=True)
        ]
        return _listed(rows, self.vocabulary).to(contexts.state.length.device)

    def _checked(self, prompt: str, response: list[int]) -> list[int]:
        where = f"for prompt {prompt!r} and response ids {response}"
        try:
            returned = self.function(prompt, list(response))
        except Exception as error:  # a user's function may raise whatever it likes
            raise ValueError(f"action mask {self.name!r} raised {describe(error)} {where}.") from error
        ids = _whole_numbers(returned)
        if ids is None:
            raise ValueError(
                f"action mask {self.name!r} must return token ids, got {returned!r:.80} {where}; return a list of "
                "whole numbers, the ids that may come next."
            )
        if any(not 0 <= one < self.vocabulary for one in ids):
            raise ValueError(
                f"action mask {self.name!r} returned an id outside 0..{self.vocabulary - 1} {where}; return ids of the "
                "vocabulary."
            )
        return ids


class Pattern:
    """Allows what can still become a text that a regular expression matches as a whole.

    The text is the response without the one space that parts it from the prompt. A stop token may come where
    the text matches already. Every token is tried at every text that was not seen lately. Each such text takes
    1 to 3 ms of a processor's time with the embedded 1,024 tokens and 60 to 140 ms with 50,257 (a number, a word
    list, sentences, anything); the first use also reads every token's own text, 5 and 260 ms.
    """

    model = None

    def __init__(
        self, pattern: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], vocabulary: int
    ) -> None:
        try:
            self.pattern = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"action_mask has no valid regular expression in {pattern!r}: {error}.") from error
        self.name, self.vocabulary = f"regex:{pattern}", vocabulary
        self.tokenizer, self.stops = tokenizer, list(stop_token_ids)
        self._ids = lru_cache(4096)(self._find)  # texts come again: rows share prefixes, episodes share starts

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        rows = [self._ids("".join(self.pieces[one] for one in ids)) for ids in contexts.responses()]
        return _listed(rows, self.vocabulary).to(contexts.state.length.device)

    @cached_property
    def pieces(self) -> list[str]:
        """What each id adds to a text; nothing for special and stop tokens, and for parts of a character."""
        ids = range(min(len(self.tokenizer), self.vocabulary))
        texts = TokenTexts(self.tokenizer)(ids)
        written = ["" if one in self.stops or "\ufffd" in text else text for one, text in zip(ids, texts, strict=True)]
        return written + [""] * (self.vocabulary - len(written))

    def _find(self, text: str) -> list[int]:
        ids = self.stops if text and self.pattern.fullmatch(text.removeprefix(" ")) else []
        return [*ids, *(one for one, piece in enumerate(self.pieces) if piece and self._goes_on(text + piece))]

    def _goes_on(self, text: str) -> bool:
        return self.pattern.fullmatch(text.removeprefix(" "), partial=True) is not None


def word_list(words: Sequence[str]) -> str:
    """The regular expression of a text that consists of these words, with spaces between."""
    if not all(map(str.strip, words)):
        raise ValueError(f"action_mask 'words:...' has an empty word in {list(words)}; write words:good,bad,fine.")
    options = "|".join(regex.escape(word.strip()) for word in words)
    return f"(?:{options})(?: (?:{options}))*"


class Masker:
    """All masks of B texts together, while the texts are being written."""

    def __init__(self, masks: Sequence[TokenMask], stop_token_ids: Sequence[int], shape: tuple[int, int, int]) -> None:
        """shape: B, L, V."""
        self.masks, self.vocabulary = masks, shape[2]
        self.stops = list(stop_token_ids)
        self.readers = [None if mask.model is None else CachedDecoder(mask.model, *shape) for mask in masks]

    def restart(self, state: TextState, rows: Tensor) -> None:
        """New texts in the rows of indices `rows` [b]; state: all B rows."""
        for reader in filter(None, self._current(state)):
            reader.restart(state.select(rows), rows)

    def advance(self, state: TextState) -> None:
        """Reads the token just written in every row."""
        for reader in filter(None, self._current(state)):
            reader.advance(state)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (indices)."""
        for reader in filter(None, self.readers):
            reader.keep(rows)

    def allowed(self, state: TextState, prompts: Sequence[str], running: Tensor) -> Tensor:
        """Bool [B, V]; true in whole where a row is not running.

        Where the masks leave nothing, the response has come to its end: the stop tokens are allowed.
        """
        rows = running.nonzero()[:, 0]
        result = torch.ones(len(running), self.vocabulary, dtype=torch.bool, device=running.device)
        if not len(rows):
            return result
        chosen = state.select(rows)
        texts = [prompts[int(row)] for row in rows]
        together = result[rows]
        for mask, reader in zip(self.masks, self._current(state), strict=True):
            logits = None if reader is None else reader.logits[rows]
            together &= mask.allowed(Contexts(texts, chosen, logits))
        stuck = (~together.any(1)).nonzero()[:, 0]
        together[stuck[:, None], torch.tensor(self.stops, device=running.device)] = True
        result[rows] = together
        return result

    def outdated(self) -> bool:
        """Whether a mask's model was refreshed since it was last asked."""
        pairs = zip(self.masks, self.readers, strict=True)
        return any(reader is not None and reader.model is not mask.model for mask, reader in pairs)

    def _current(self, state: TextState) -> list[CachedDecoder | None]:
        """The readers, made anew where a mask's model was refreshed; they then read the texts so far again."""
        if self.outdated():
            self.readers = [
                reader.of_model(mask.model, state) if reader is not None and mask.model is not None else None
                for mask, reader in zip(self.masks, self.readers, strict=True)
            ]
        return self.readers


def _whole_numbers(returned: Any) -> list[int] | None:
    """What a function returned as ids; None where it is something else, a mask of truth values for instance."""
    try:
        ids = np.array(returned.tolist() if isinstance(returned, Tensor) else list(returned))
    except (TypeError, ValueError):
        return None
    return ids.tolist() if ids.size == 0 or (ids.ndim == 1 and ids.dtype.kind in "iu") else None


def _listed(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Bool [b, V] that is true at the ids of each row."""
    result = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for row, ids in enumerate(rows):
        result[row, torch.tensor(ids, dtype=torch.long)] = True
    return result
