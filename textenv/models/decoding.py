"""Decoding of responses, one token at a time: from a key/value cache, or by reading the whole text again.

The cache costs one token's work a token, at any length so far. Its rows stand at their own columns, so texts may have
different lengths and restart at different times. Not every architecture can do that: a recurrent state has no columns,
and some models count positions by themselves. `new_decoder` therefore compares the cache with whole forwards, once per
model, and falls back to whole forwards where the cache gives other numbers.

`advance` never waits for the device: the host keeps its own count of the tokens in each row, an upper bound, and so
knows how many columns to read. `restart` and `keep` do wait.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.models.cache import KeyValueCache, Step, read_token
from textenv.models.comparison import bound, relative_difference, sample_texts
from textenv.models.compiled import borrow_step
from textenv.models.language_model import output_width, read
from textenv.state import TextState, left_aligned

logger = logging.getLogger(__name__)

COLUMNS_AT_ONCE = 32  # attention reads a multiple of this many columns, so that steps have few shapes


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How responses are written. Nothing here changes a number beyond rounding."""

    slots: int | None = None  # responses that are written at a time, the others wait; None: all of them
    compile: bool = False  # the step is compiled (CUDA: captured as a graph) once for each shape, which takes a while
    look_every: int | None = None  # steps between two looks at which rows have finished; None: 1 on a CPU, else 8

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots must be 1 or more, or None for all responses at once; got {self.slots}.")
        if self.look_every is not None and self.look_every < 1:
            raise ValueError(
                f"look_every must be 1 or more, or None to choose it by the device; got {self.look_every}."
            )


class Decoder:
    """Next-token logits of B texts while they are being written; this one reads the whole text for every token."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, vocabulary: int) -> None:
        self.model, self.columns = model, columns
        self.logits = torch.zeros(rows, vocabulary, device=model.device)  # float32 [B, V]
        self.filled = [1] * rows  # tokens in each row, or more: the host's count

    def restart(self, texts: TextState, rows: Tensor) -> None:
        """Read other texts, of any lengths, in the row indices `rows` [b]; texts: b rows.

        Equal texts that follow one another, such as the prompts of a group, are read once.
        """
        ids, length = left_aligned(texts.input_ids, texts.attention_mask)
        for row, count in zip(rows.tolist(), length.tolist(), strict=True):
            self.filled[row] = max(count, 1)
        fresh = torch.ones_like(length, dtype=torch.bool)  # [b], unlike the text before
        fresh[1:] = (ids[1:] != ids[:-1]).any(1) | (length[1:] != length[:-1])
        source = fresh.cumsum(0) - 1  # [b], which of these texts a row has
        logits = self._read((ids[fresh], length[fresh]), rows, source).float()
        self.logits = self.logits.index_copy(0, rows, logits[source])

    def advance(self, state: TextState) -> None:
        """Read the last token of every row; state: all B rows."""
        self.logits = self._advance(state, self._count_up()).float()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        self.logits = self.logits[rows]
        self.filled = [self.filled[row] for row in rows.tolist()]

    def with_model(self, model: PreTrainedModel, state: TextState) -> Decoder:
        """A decoder of the same texts with another model, which reads them from the start; state: all B rows."""
        decoder = new_decoder(model, len(self.logits), self.columns, self.logits.shape[1])
        decoder.restart(state, torch.arange(len(self.logits), device=self.logits.device))
        return decoder

    def _count_up(self) -> int:
        """Count one more token in every row. Returns the largest count."""
        self.filled = [min(count + 1, self.columns) for count in self.filled]
        return max(self.filled)

    def _read(self, texts: tuple[Tensor, Tensor], rows: Tensor, source: Tensor) -> Tensor:
        """Logits [n, V] after n left-aligned texts; rows, source: where they go, for a cache."""
        ids, length = texts
        with torch.no_grad():
            return read(self.model, ids, (length - 1).clamp_min(0)[:, None])[0][:, 0]

    def _advance(self, state: TextState, used: int) -> Tensor:
        rows = torch.arange(len(self.logits), device=self.logits.device)
        return self._read(left_aligned(state.input_ids, state.attention_mask, used), rows, rows)


class CachedDecoder(Decoder):
    """A decoder that owns a key/value cache, and reads only the new token of each row."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, vocabulary: int, compile: bool = False) -> None:
        super().__init__(model, rows, columns, vocabulary)
        self.step: Step = read_token
        if compile:
            self.step = borrow_step(model, rows, columns, self)
            self.cache = self.step.cache
        else:
            self.cache = KeyValueCache(model, rows, columns)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        self.cache.keep(rows, max(self.filled))
        super().keep(rows)

    @torch.no_grad()
    def _read(self, texts: tuple[Tensor, Tensor], rows: Tensor, source: Tensor) -> Tensor:
        return self.cache.read(self.model, texts, rows, source)

    @torch.no_grad()
    def _advance(self, state: TextState, used: int) -> Tensor:
        tokens, columns = state.newest
        used = min(-(-used // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE, self.columns)
        return self.step(self.model, self.cache.live, tokens, columns, used)


def new_decoder(model: PreTrainedModel, rows: int, columns: int, vocabulary: int, compile: bool = False) -> Decoder:
    """A decoder of B texts of at most L tokens: from the cache where that is right for the model.

    compile: as in `Decoding`; of no use where whole texts are read.
    """
    if decodes_from_cache(model, columns):
        return CachedDecoder(model, rows, columns, vocabulary, compile)
    return Decoder(model, rows, columns, vocabulary)


_reasons: WeakKeyDictionary[PreTrainedModel, dict[int, str]] = WeakKeyDictionary()  # model -> columns -> why not


def decodes_from_cache(model: PreTrainedModel, columns: int) -> bool:
    """Whether the cache gives the numbers of whole forwards, for texts of at most L tokens. Compared once per model."""
    reasons = _reasons.setdefault(model, {})
    if columns not in reasons:
        reasons[columns] = _why_not(model, columns)
        if reasons[columns]:
            _say_slow(type(model).__name__, reasons[columns])
    return not reasons[columns]


def share_comparison(copy: PreTrainedModel, original: PreTrainedModel) -> None:
    """Decode `copy` as `original` is decoded, without a comparison of its own, if only their weights differ.

    What the cache gets wrong lies in the architecture. With another class, configuration or dtype, nothing is shared.
    """
    if (
        type(copy) is type(original)
        and copy.dtype == original.dtype
        and copy.device == original.device
        and copy.config.to_dict() | {"dtype": None} == original.config.to_dict() | {"dtype": None}
    ):
        _reasons[copy] = _reasons.setdefault(original, {})


def _why_not(model: PreTrainedModel, columns: int) -> str:
    """How the cache differs from whole forwards; empty if it does not."""
    vocabulary = output_width(model)
    texts = sample_texts(vocabulary, columns, min(3, columns - 1), model.device)
    try:
        cached = _decode_samples(CachedDecoder(model, 3, columns, vocabulary), texts)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any kind: the architecture wants another cache than ours
        return f"{type(error).__name__} in its forward"
    difference = relative_difference(cached, _decode_samples(Decoder(model, 3, columns, vocabulary), texts))
    return "" if difference <= bound(model.dtype) else f"logits off by {difference:.0%} of their spread"


def _decode_samples(decoder: Decoder, texts: TextState) -> Tensor:
    """Logits [steps + 2, 3, V] while three texts are written and one of them restarts."""
    rows = torch.arange(3, device=texts.length.device)
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    decoder.restart(texts, rows)
    logits, state = [decoder.logits], texts
    for tokens in texts.response_ids.T:
        state = state.append(tokens, everywhere)
        decoder.advance(state)
        logits.append(decoder.logits)
    decoder.restart(texts.select(rows[1:2]), rows[1:2])
    decoder.advance(state.restart(rows[1:2], texts.select(rows[1:2])).append(texts.input_ids[:, 0], rows == 1))
    return torch.stack([*logits, decoder.logits])


@lru_cache
def _say_slow(name: str, reason: str) -> None:
    """One line per architecture and process."""
    logger.warning(
        "%s cannot decode from this library's key/value cache (%s), so every token reads its whole text again: the "
        "numbers are right, and decoding is slower.",
        name,
        reason,
    )
