"""The key/value cache of decoding, in fixed memory: two tensors a layer, [B, heads, L, D], made once.

Rows stand at their own columns, so texts may have different lengths and restart at different times.
`KeyValueCache.read` takes whole texts, `read_token` one token a row. The second never waits for the device: tokens are
written by index, and the caller knows how many columns attention has to read. Those two numbers, rows and columns, are
all its shapes, so it can be compiled, or captured, once for each pair.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from textenv.models.language_model import read

Buffers = list[tuple[Tensor, Tensor] | None]  # keys and values, layer by layer; None for a layer that caches nothing


class Step(Protocol):
    """`read_token`, or a faster form of it that gives the same numbers."""

    def __call__(
        self, model: PreTrainedModel, buffers: Buffers, tokens: Tensor, columns: Tensor, used: int, /
    ) -> Tensor:
        """Logits [B, V]."""
        ...


class KeyValueCache:
    """Keys and values of B rows by L columns. The first forward tells the shapes of a layer."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.size, self.rows = (rows, columns), rows
        self.memory: Buffers = [None] * model.config.get_text_config().num_hidden_layers  # of all rows

    @property
    def live(self) -> Buffers:
        """The rows that were kept. `.data` is no view, whose whole would be part of the shapes that are compiled."""
        return [layer and (layer[0][: self.rows].data, layer[1][: self.rows].data) for layer in self.memory]

    def clear(self) -> None:
        """Empty the cache, of all rows again. What attention does not see is multiplied by 0, and 0 · NaN is NaN."""
        self.rows = self.size[0]
        for layer in self.memory:
            for each in layer or ():
                each.zero_()

    def read(self, model: PreTrainedModel, texts: tuple[Tensor, Tensor], rows: Tensor, source: Tensor) -> Tensor:
        """Read whole texts, and put text `source[i]` into row `rows[i]`. Returns next-token logits [n, V].

        texts: left-aligned ids, int64 [n, T], and their lengths, int64 [n]; rows, source: int64 [b].
        """
        ids, length = texts
        cache = Cache(layers=[_WholeTexts(self, layer, (rows, source)) for layer in range(len(self.memory))])
        last = (length - 1).clamp_min(0)[:, None]
        return read(model, ids, last, past_key_values=cache, use_cache=True)[0][:, 0]

    def keep(self, rows: Tensor, used: int) -> None:
        """Drop all rows except these indices [b]: they move to the front of the same memory, `used` columns of them."""
        self.rows = len(rows)
        for layer in self.memory:
            for each in layer or ():
                each[: self.rows, :, :used] = each[:, :, :used][rows]


def read_token(model: PreTrainedModel, buffers: Buffers, tokens: Tensor, columns: Tensor, used: int) -> Tensor:
    """Read one token in every row, whose earlier tokens are in the cache. Returns next-token logits [B, V].

    tokens: int64 [B]; columns: int64 [B], where they stand; used: the number of columns that attention reads, more than
    the largest of `columns`. To read a token again changes nothing.
    """
    places = torch.arange(len(columns), device=columns.device), columns
    cache = Cache(layers=[_OneToken(layer, places, used) for layer in buffers])
    output = model(
        input_ids=tokens[:, None],
        attention_mask=_attention_masks(model, columns, used),
        position_ids=columns[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]


class _Layer(CacheLayerMixin):
    """What Transformers asks of a layer's cache, answered for texts that start in column 0."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError  # `update` does without

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # of whole texts; single tokens bring their own mask

    def get_seq_length(self) -> int:
        return 0  # of whole texts; single tokens bring their own positions


class _WholeTexts(_Layer):
    """Whole texts attend to themselves, and the cache takes notes: text `source[i]` goes to row `rows[i]`."""

    def __init__(self, owner: KeyValueCache, layer: int, places: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.owner, self.layer = owner, layer
        self.into, self.source = places

    def get_max_length(self) -> int:
        return self.owner.size[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        buffers = self.owner.memory[self.layer]
        if buffers is None:
            buffers = self.owner.memory[self.layer] = (self._empty(key_states), self._empty(value_states))
        width = key_states.shape[2]
        buffers[0][self.into, :, :width] = key_states[self.source]
        buffers[1][self.into, :, :width] = value_states[self.source]
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def _empty(self, states: Tensor) -> Tensor:
        rows, columns = self.owner.size
        # One column more than texts have: the columns in use, which would be contiguous, are another case to compile.
        return states.new_zeros(rows, states.shape[1], columns + 1, states.shape[3])


class _OneToken(_Layer):
    """One token a row, written at `places`, rows and columns [B]; attention reads the first `used` columns."""

    def __init__(self, buffers: tuple[Tensor, Tensor] | None, places: tuple[Tensor, Tensor], used: int) -> None:
        super().__init__()
        self.buffers, self.used = buffers, used
        self.rows, self.columns = places

    def get_max_length(self) -> int:
        return self.used if self.buffers is None else self.buffers[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        keys, values = self.buffers
        keys[self.rows, :, self.columns] = key_states[:, :, 0]
        values[self.rows, :, self.columns] = value_states[:, :, 0]
        self.keys, self.values = keys[:, :, : self.used], values[:, :, : self.used]
        return self.keys, self.values


def _attention_masks(model: PreTrainedModel, columns: Tensor, used: int) -> Any:
    """Which cached columns each row's new token sees: one mask [B, 1, 1, used], or one for each type of layer.

    Transformers passes a 4-D additive mask unchanged to every attention implementation.
    """
    config: Any = model.config.get_text_config()
    keys, queries = torch.arange(used, device=columns.device), columns[:, None]
    seen = keys <= queries  # [B, used]

    def additive(visible: Tensor) -> Tensor:
        return torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)[:, None, None]

    window = getattr(config, "sliding_window", None) or used
    chunk = getattr(config, "attention_chunk_size", None) or used
    if used <= min(window, chunk):
        return additive(seen)
    sliding = seen & (keys > queries - window)
    types = getattr(config, "layer_types", None)
    if types is None:
        return additive(sliding)  # every layer of Mistral slides, and has no type
    chunked = seen & (keys // chunk == queries // chunk)
    masks = {"full_attention": seen, "sliding_attention": sliding, "chunked_attention": chunked}
    return {name: additive(masks[name]) for name in set(types) if name in masks}
