"""Decoding of responses, one token at a time: from a key/value cache, or by reading the whole text again.

The cache costs one token's work a token, at any length so far. Its rows stand at their own columns, so texts may have
different lengths and restart at different times. Not every architecture can do that: a recurrent state has no columns,
and some models count positions by themselves. `new_decoder` therefore compares the cache with whole forwards, once per
model, and falls back to whole forwards where the cache gives other numbers.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from textenv.models.comparison import bound, relative_difference, sample_texts
from textenv.models.language_model import output_width, read
from textenv.state import TextState, left_aligned

logger = logging.getLogger(__name__)


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [B, heads, L, D], written at the rows and columns in `owner.target`."""

    def __init__(self, owner: KeyValueCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.owner.rows, self.owner.columns
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, columns, used = self.owner.target
        if columns is None:  # whole texts attend to themselves; the cache takes notes
            width = key_states.shape[2]
            self.keys[rows, :, :width] = key_states
            self.values[rows, :, :width] = value_states
            return key_states, value_states
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[:, :, :used], self.values[:, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # of whole texts; single tokens bring their own mask

    def get_seq_length(self) -> int:
        return 0  # of whole texts; single tokens bring their own positions

    def get_max_length(self) -> int:
        return self.owner.columns


class KeyValueCache(Cache):
    """Keys and values of B rows by L columns.

    `target` says what the next forward writes and reads: the rows, the column of each row (None: whole texts from
    column 0 on), and the number of columns that attention reads.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.target: tuple[Tensor, Tensor | None, int] = (torch.empty(0), None, 0)
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        self.rows = len(rows)
        for layer in self.layers:
            assert isinstance(layer, _Layer) and layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class Decoder:
    """Next-token logits of B texts while they are being written; this one reads the whole text for every token."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, vocabulary: int) -> None:
        self.model, self.columns = model, columns
        self.logits = torch.zeros(rows, vocabulary, device=model.device)  # float32 [B, V]

    def restart(self, texts: TextState, rows: Tensor) -> None:
        """Read other texts, of any lengths, in the row indices `rows` [b]; texts: b rows."""
        self.logits = self.logits.index_copy(0, rows, self._read(texts, rows))

    def advance(self, state: TextState) -> None:
        """Read the last token of every row; state: all B rows."""
        self.logits = self._read(state, torch.arange(len(self.logits), device=self.logits.device))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        self.logits = self.logits[rows]

    def with_model(self, model: PreTrainedModel, state: TextState) -> Decoder:
        """A decoder of the same texts with another model, which reads them from the start; state: all B rows."""
        decoder = new_decoder(model, len(self.logits), self.columns, self.logits.shape[1])
        decoder.restart(state, torch.arange(len(self.logits), device=self.logits.device))
        return decoder

    @torch.no_grad()
    def _read(self, texts: TextState, rows: Tensor, **cache: Any) -> Tensor:
        """Float32 [b, V], after the last token of each text."""
        ids, length = left_aligned(texts.input_ids, texts.attention_mask)
        return read(self.model, ids, (length - 1).clamp_min(0)[:, None], **cache)[0][:, 0].float()


class CachedDecoder(Decoder):
    """A decoder that owns a key/value cache, and reads only the new token of each row."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, vocabulary: int) -> None:
        super().__init__(model, rows, columns, vocabulary)
        self.cache = KeyValueCache(model.config.get_text_config().num_hidden_layers, rows, columns)

    @torch.no_grad()
    def advance(self, state: TextState) -> None:
        """Decode the last token of every row; state: all B rows, whose earlier tokens are in the cache."""
        rows = torch.arange(len(self.logits), device=self.logits.device)
        columns = (state.attention_mask.sum(1) - 1).clamp_min(0)  # [B]; a row that never started has no token
        used = int(columns.max()) + 1
        self.cache.target = (rows, columns, used)
        output = self.model(
            input_ids=state.input_ids[rows, state.prompt_width + state.length - 1, None],
            attention_mask=_attention_masks(self.model, columns, used),
            position_ids=columns[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1].float()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        super().keep(rows)
        self.cache.keep(rows)

    def _read(self, texts: TextState, rows: Tensor, **cache: Any) -> Tensor:
        self.cache.target = (rows, None, 0)
        return super()._read(texts, rows, past_key_values=self.cache, use_cache=True)


def _attention_masks(model: PreTrainedModel, columns: Tensor, used: int) -> Any:
    """Which cached columns each row's new token sees: one mask [B, 1, 1, used], or one for each type of layer.

    Transformers passes a 4-D additive mask unchanged to every attention implementation.
    """
    config: Any = model.config.get_text_config()
    keys, queries = torch.arange(used, device=columns.device), columns[:, None]
    seen = keys <= queries  # [B, used]

    def additive(visible: Tensor) -> Tensor:
        bias = torch.zeros(visible.shape, dtype=model.dtype, device=columns.device)
        return bias.masked_fill(~visible, torch.finfo(model.dtype).min)[:, None, None]

    window = getattr(config, "sliding_window", None) or used
    chunk = getattr(config, "attention_chunk_size", None) or used
    sliding = seen & (keys > queries - window)
    chunked = seen & (keys // chunk == queries // chunk)
    masks = {"full_attention": seen, "sliding_attention": sliding, "chunked_attention": chunked}
    types = getattr(config, "layer_types", None)
    if types is None:
        return additive(sliding)  # every layer of Mistral slides, and has no type
    if used <= min(window, chunk):
        return additive(seen)
    return {name: additive(masks[name]) for name in set(types) if name in masks}


def new_decoder(model: PreTrainedModel, rows: int, columns: int, vocabulary: int) -> Decoder:
    """A decoder of B texts of at most L tokens: from the cache where that is right for the model."""
    kind = CachedDecoder if decodes_from_cache(model, columns) else Decoder
    return kind(model, rows, columns, vocabulary)


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
