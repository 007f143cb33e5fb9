"""A Hugging Face causal language model in three operations: prefill, decode one token, forward a whole text.

Owns the key/value cache: a token costs one token's work, at any length so far. Rows may have different lengths, because
each row writes its own column of the cache. Never samples, never mutates the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin

from textenv.state import TextState, position_ids


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and the tokens that end a response."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]

    @property
    def vocabulary(self) -> int:
        """V, the width of the model's logits."""
        embeddings: Any = self.model.get_output_embeddings()
        return embeddings.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device


def response_logits(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> Tensor:
    """Logits that predict the response columns P..L-1 of left-padded texts [B, L]. Returns [B, R, V]."""
    return model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1].long(),
        position_ids=position_ids(attention_mask)[:, :-1],
        logits_to_keep=input_ids.shape[1] - prompt_width,
        use_cache=False,
    ).logits


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
        if columns is None:  # prefill: the prompt attends only to itself
            width = key_states.shape[2]
            self.keys[rows, :, :width] = key_states
            self.values[rows, :, :width] = value_states
            return key_states, value_states
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[:, :, :used], self.values[:, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.columns, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always passed

    def get_max_length(self) -> int:
        return self.owner.columns


class KeyValueCache(Cache):
    """Keys and values of B rows by L columns.

    `target` says what the next forward writes and reads: the rows, the column of each row (None: a whole prompt from
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


def new_cache(model: PreTrainedModel, rows: int, columns: int) -> KeyValueCache:
    """An empty cache for `rows` texts of at most `columns` tokens."""
    return KeyValueCache(model.config.get_text_config().num_hidden_layers, rows, columns)


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: KeyValueCache, state: TextState, rows: Tensor) -> Tensor:
    """Write the prompts of `state` into the cache at the row indices `rows` [b].

    state: b rows; response columns are ignored. Returns the logits of the first response token, [b, V].
    """
    width = state.prompt_width
    mask = state.attention_mask[:, :width]  # [b, P]
    causal = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
    cache.target = (rows, None, width)
    return _forward(model, cache, state.input_ids[:, :width], causal & mask[:, None], position_ids(mask))


@torch.no_grad()
def decode(model: PreTrainedModel, cache: KeyValueCache, state: TextState) -> Tensor:
    """Write the last token of every row of `state` into the cache, which must hold the earlier tokens.

    Returns the logits of the next token, [B, V].
    """
    columns = state.prompt_width + state.length - 1  # [B]
    used = int(columns.max()) + 1
    mask = state.attention_mask[:, :used]
    rows = torch.arange(len(columns), device=columns.device)
    positions = (mask.sum(1, keepdim=True) - 1).clamp_min(0)  # [B, 1]; a row that never started has no token
    cache.target = (rows, columns, used)
    return _forward(model, cache, state.input_ids[rows, columns, None], mask[:, None], positions)


class CachedDecoder:
    """Next-token logits of B texts while they are being written. Owns its key/value cache."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, vocabulary: int) -> None:
        self.model, self.cache = model, new_cache(model, rows, columns)
        self.logits = torch.zeros(rows, vocabulary, device=model.device)  # float32 [B, V]

    def restart(self, fresh: TextState, rows: Tensor) -> None:
        """Prefill new prompts in the row indices `rows` [b]; fresh: b rows."""
        self.logits[rows] = prefill(self.model, self.cache, fresh, rows).float()

    def advance(self, state: TextState) -> None:
        """Decode the last token of every row; state: all B rows."""
        self.logits = decode(self.model, self.cache, state).float()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except these indices."""
        self.cache.keep(rows)
        self.logits = self.logits[rows]

    def with_model(self, model: PreTrainedModel, state: TextState) -> CachedDecoder:
        """A decoder of the same texts with another model, which reads them from the start; state: all B rows."""
        rows, vocabulary = self.logits.shape
        decoder = CachedDecoder(model, rows, self.cache.columns, vocabulary)
        decoder._replay(state)
        return decoder

    def _replay(self, state: TextState) -> None:
        self.restart(state, torch.arange(len(state.length), device=state.length.device))
        after_prompt, columns = self.logits, torch.arange(state.input_ids.shape[1], device=state.length.device)
        for step in range(1, int(state.length.max()) + 1):
            # Shorter rows decode their last token again, which changes nothing; empty rows are corrected below.
            length = state.length.clamp(1, step)
            mask = state.attention_mask & (columns < state.prompt_width + length[:, None])
            self.advance(replace(state, attention_mask=mask, length=length))
        self.logits = torch.where(state.length[:, None] > 0, self.logits, after_prompt)


def _forward(
    model: PreTrainedModel, cache: KeyValueCache, input_ids: Tensor, visible: Tensor, positions: Tensor
) -> Tensor:
    """Last-position logits [b, V]; visible: bool [b, queries, keys]."""
    # Transformers passes a 4-D additive mask unchanged to every attention implementation. The finite minimum keeps
    # rows without a visible key (padding) free of NaN.
    blocked = torch.finfo(model.dtype).min
    bias = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
    output = model(
        input_ids=input_ids,
        attention_mask=bias.masked_fill(~visible, blocked)[:, None],  # [b, 1, queries, keys]
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
