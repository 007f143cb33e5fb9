"""Action masks: which tokens may come next. The forms of `action_mask` are in build.py; token_sets.py stores masks.

A mask advises whoever samples. The environment shows it and accepts forbidden tokens too, so that clients without masks
still work; the fast path and our learners obey it. Masks never change the reward: the reference's log-probability
comes from its whole distribution, and so stays finite for every token.

An object that follows `TokenMask` is accepted as `action_mask`; it needs no base class.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import regex
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.kl import FiniteCheck
from textenv.models.decoding import Decoder, new_decoder, share_comparison
from textenv.models.language_model import cast_weights
from textenv.models.sampling import Sampling, log_probs
from textenv.models.token_texts import TokenTexts
from textenv.rewards.calling import describe
from textenv.state import TextState

CACHE_BYTES = 2**25  # of the texts that a pattern remembers: 5,000 texts of a vocabulary of 50,257


@dataclass(frozen=True)
class Contexts:
    """The b unfinished texts for which a mask is computed."""

    prompts: Sequence[str]
    state: TextState  # b rows
    logits: Tensor | None  # float32 [b, V], next-token logits of the mask's own model; None if it has none

    def responses(self) -> list[list[int]]:
        """Token ids written so far, row by row."""
        rows = torch.cat([self.state.length[:, None], self.state.response_ids], 1).tolist()  # one copy to the host
        return [ids[:length] for length, *ids in rows]


@runtime_checkable
class TokenMask(Protocol):
    """Decides which tokens may come next. Any object with these three members is accepted as `action_mask`.

    A mask is called once per context, with the rows that are running. It may depend on the prompts and on the tokens so
    far, not on which rows come together.
    """

    @property
    def name(self) -> str:
        """The mask's name in error messages."""
        ...

    @property
    def model(self) -> PreTrainedModel | None:
        """A causal language model with the policy's vocabulary, in eval mode; None if the mask needs no logits.

        `Contexts.logits` holds its next-token logits. If it is replaced by another model, the texts so far are read
        again.
        """
        ...

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V], or [V] for all rows alike; true = may come next."""
        ...


class NoSpecialTokens:
    """Forbids special tokens, except those that end a response, and ids that the tokenizer never writes."""

    name, model = "special", None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], vocabulary: int) -> None:
        ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        ids = [token for token in ordinary | set(stop_token_ids) if token < vocabulary]
        self.ids = _dense([ids], vocabulary)[0]

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [V]."""
        self.ids = self.ids.to(contexts.state.length.device)  # copied once
        return self.ids


class MaskPolicy:
    """Keeps the likeliest tokens of a language model of its own: the mask of NLPO (Ramamurthy et al. 2023).

    It starts as the reference. The trainer calls `refresh` with the actor from time to time.
    """

    def __init__(self, model: PreTrainedModel, keep: Sampling) -> None:
        self.model: PreTrainedModel | None = model
        self.keep, self.dtype = keep, model.dtype
        self.name = f"top_k:{keep.top_k}" if keep.top_k else f"top_p:{keep.top_p:g}"

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        assert contexts.logits is not None
        return log_probs(contexts.logits, self.keep).isfinite()

    def refresh(self, model: PreTrainedModel) -> None:
        """Replace the mask's model by a frozen copy of `model`, in the precision of the first one.

        A checkpoint's weights are loaded into the first one, so no later one may hold more digits than fit in it. The
        copy is a new object: a thread that reads the old one is not disturbed, and decoders see that it was replaced.
        """
        assert self.model is not None
        frozen: Any = copy.deepcopy(model).requires_grad_(False).eval()
        cast_weights(frozen, self.dtype)
        share_comparison(frozen, self.model)
        self.model = frozen


class AllowedIds:
    """A user's function `f(prompt: str, response_ids: list[int]) -> allowed ids`, such as a grammar or a lexicon.

    The idea of `prefix_allowed_tokens_fn` in Transformers' `generate`.
    """

    model = None

    def __init__(self, function: Callable[[str, list[int]], Iterable[int]], name: str, vocabulary: int) -> None:
        self.function, self.name, self.vocabulary = function, name, vocabulary

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        rows = [
            self._call(prompt, response)
            for prompt, response in zip(contexts.prompts, contexts.responses(), strict=True)
        ]
        return _dense(rows, self.vocabulary).to(contexts.state.length.device)

    def _call(self, prompt: str, response: list[int]) -> list[int]:
        where = f"for prompt {prompt!r} and response ids {response}"
        try:
            result = self.function(prompt, list(response))
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"action mask {self.name!r} raised {describe(error)} {where}.") from error
        ids = _as_ids(result)
        if ids is None:
            raise ValueError(
                f"action mask {self.name!r} must return token ids, got {result!r:.80} {where}; return a list of "
                "whole numbers, the ids that may come next."
            )
        if any(not 0 <= token < self.vocabulary for token in ids):
            raise ValueError(
                f"action mask {self.name!r} returned an id outside 0..{self.vocabulary - 1} {where}; return ids of the "
                "vocabulary."
            )
        return ids


class Pattern:
    """Allows tokens after which the text can still match a regular expression as a whole.

    The text is the response without the single space that separates it from the prompt. A stop token is allowed where
    the text already matches. For each text that is not in the cache, every token is tried. That takes 1 to 3 ms of CPU
    time per text with the embedded 1,024 tokens, and 60 to 140 ms with 50,257 (a number, a word list, sentences,
    anything). The first use also decodes every token by itself, which takes 5 and 260 ms. The cache holds one bit per
    text and token, and beyond `CACHE_BYTES` drops the least recently used texts.
    """

    model = None

    def __init__(
        self, pattern: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], vocabulary: int
    ) -> None:
        try:
            self.pattern = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"action_mask has an invalid regular expression, {pattern!r}: {error}.") from error
        self.name, self.vocabulary = f"regex:{pattern}", vocabulary
        self.tokenizer, self.stops = tokenizer, list(stop_token_ids)
        # By text, V bits each. Texts repeat: rows share prefixes, episodes starts.
        self.cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self.cached_bytes = 0

    def allowed(self, contexts: Contexts) -> Tensor:
        """Bool [b, V]."""
        rows = [self._allowed_after("".join(self.pieces[token] for token in ids)) for ids in contexts.responses()]
        allowed = np.unpackbits(np.stack(rows), axis=1, count=self.vocabulary).view(bool)
        return torch.from_numpy(allowed).to(contexts.state.length.device)

    def _allowed_after(self, text: str) -> np.ndarray:
        """The tokens that may follow, V bits packed into bytes."""
        bits = self.cache.get(text)
        if bits is None:
            bits = self.cache[text] = np.packbits(self._try_tokens(text))
            self.cached_bytes += _entry_bytes(text, bits)
            while self.cached_bytes > CACHE_BYTES and len(self.cache) > 1:
                self.cached_bytes -= _entry_bytes(*self.cache.popitem(last=False))
        self.cache.move_to_end(text)
        return bits

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each id; empty for special and stop tokens, and for parts of a character."""
        ids = range(min(len(self.tokenizer), self.vocabulary))
        texts = TokenTexts(self.tokenizer)(ids)
        pieces = [
            "" if token in self.stops or "\ufffd" in text else text for token, text in zip(ids, texts, strict=True)
        ]
        return pieces + [""] * (self.vocabulary - len(pieces))

    def _try_tokens(self, text: str) -> np.ndarray:
        """Bool [V]."""
        allowed = np.array([bool(piece) and self._can_match(text + piece) for piece in self.pieces])
        allowed[self.stops] = bool(text) and self.pattern.fullmatch(text.removeprefix(" ")) is not None
        return allowed

    def _can_match(self, text: str) -> bool:
        return self.pattern.fullmatch(text.removeprefix(" "), partial=True) is not None


def _entry_bytes(text: str, bits: np.ndarray) -> int:
    """Memory of a cached text, its bits and its place in the cache."""
    return sys.getsizeof(text) + sys.getsizeof(bits) + 100


def word_list(words: Sequence[str]) -> str:
    """Regular expression for one or more of these words, separated by single spaces."""
    if not all(map(str.strip, words)):
        raise ValueError(f"action_mask 'words:...' has an empty word in {list(words)}; write words:good,bad,fine.")
    options = "|".join(regex.escape(word.strip()) for word in words)
    return f"(?:{options})(?: (?:{options}))*"


class Masker:
    """The conjunction of all masks over B texts, while the texts are being written.

    The named masks that need no text (`special`, `top_k`, `top_p`) never wait for the device. The others are functions
    of the host: each waits twice a step, whatever the number of rows.
    """

    def __init__(self, masks: Sequence[TokenMask], stop_token_ids: Tensor, shape: tuple[int, int, int]) -> None:
        """shape: B, L, V."""
        self.masks, self.vocabulary = masks, shape[2]
        self.stops = torch.zeros(self.vocabulary, dtype=torch.bool, device=stop_token_ids.device)  # [V]
        self.stops[stop_token_ids] = True
        self.finite = FiniteCheck()
        self.decoders = [None if mask.model is None else new_decoder(mask.model, *shape) for mask in masks]

    def restart(self, state: TextState, rows: Tensor) -> None:
        """Start new texts in the rows of indices `rows` [b]; state: all B rows."""
        for decoder in filter(None, self._refreshed(state)):
            decoder.restart(state.select(rows), rows)

    def advance(self, state: TextState) -> None:
        """Decode the last token of every row."""
        for decoder in filter(None, self._refreshed(state)):
            decoder.advance(state)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        for decoder in filter(None, self.decoders):
            decoder.keep(rows)

    def allowed(self, state: TextState, prompts: Sequence[str], running: Tensor) -> Tensor:
        """Bool [B, V]; all true where a row is not running.

        Where the masks leave no token, the response must end: the stop tokens are allowed. Logits that are not finite
        are noted in `finite`, and the caller asks it before using what they led to.
        """
        allowed = torch.ones(len(running), self.vocabulary, dtype=torch.bool, device=running.device)
        for mask, decoder in zip(self.masks, self._refreshed(state), strict=True):
            logits = None if decoder is None else self._finite(mask.name, decoder.logits, running, state.length)
            if type(mask) in (NoSpecialTokens, MaskPolicy):  # tensors alone decide, so any row will do
                allowed &= mask.allowed(Contexts(prompts, state, logits))
            else:
                allowed &= self._by_running_rows(mask, Contexts(prompts, state, logits), running)
        allowed |= self.stops & ~allowed.any(1, keepdim=True)
        return allowed | ~running[:, None]

    def _finite(self, name: str, logits: Tensor, running: Tensor, token: Tensor) -> Tensor:
        """The logits [B, V], and zeros in the rows that have none, which are noted."""
        largest = logits.amax(-1)
        self.finite.note(f"the largest logit of action mask {name!r}", largest, running, token)
        return logits.where(largest.isfinite()[:, None], 0.0)

    def _by_running_rows(self, mask: TokenMask, contexts: Contexts, running: Tensor) -> Tensor:
        """What a mask allows that may read texts, so it sees the running rows alone. Bool [B, V]."""
        index = [row for row, runs in enumerate(running.tolist()) if runs]
        result = torch.ones(len(running), self.vocabulary, dtype=torch.bool, device=running.device)
        if not index:
            return result
        rows = torch.tensor(index, device=running.device)
        logits = None if contexts.logits is None else contexts.logits[rows]
        prompts = [contexts.prompts[row] for row in index]
        allowed = mask.allowed(Contexts(prompts, contexts.state.select(rows), logits))
        _check_allowed(mask.name, allowed, len(index), self.vocabulary)
        return result.index_copy(0, rows, allowed.to(running.device).expand(len(index), -1))

    def outdated(self) -> bool:
        """Whether a mask's model has been replaced since its decoder was made."""
        pairs = zip(self.masks, self.decoders, strict=True)
        return any(decoder is not None and decoder.model is not mask.model for mask, decoder in pairs)

    def _refreshed(self, state: TextState) -> list[Decoder | None]:
        """The decoders. If a mask's model was replaced, its new decoder first reads the texts so far."""
        if self.outdated():
            self.decoders = [
                decoder.with_model(mask.model, state) if decoder is not None and mask.model is not None else None
                for mask, decoder in zip(self.masks, self.decoders, strict=True)
            ]
        return self.decoders


def _check_allowed(name: str, allowed: Any, rows: int, vocabulary: int) -> None:
    """Refuse a result of `TokenMask.allowed` that is not a bool tensor [b, V] or [V]."""
    if not isinstance(allowed, Tensor):
        got = type(allowed).__name__
    elif allowed.dtype != torch.bool or tuple(allowed.shape) not in ((vocabulary,), (rows, vocabulary)):
        got = f"{allowed.dtype} of shape {tuple(allowed.shape)}"
    else:
        return
    raise ValueError(
        f"action mask {name!r} must return a bool tensor of shape ({vocabulary},) or ({rows}, {vocabulary}), got {got}."
    )


def _as_ids(result: Any) -> list[int] | None:
    """The ids that a function returned; None if they are not integers, as in a mask of truth values."""
    try:
        ids = np.array(result.tolist() if isinstance(result, Tensor) else list(result))
    except (TypeError, ValueError):
        return None
    return ids.tolist() if ids.size == 0 or (ids.ndim == 1 and ids.dtype.kind in "iu") else None


def _dense(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Bool [b, V], true at the ids of each row."""
    result = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for row, ids in enumerate(rows):
        result[row, torch.tensor(ids, dtype=torch.long)] = True
    return result
