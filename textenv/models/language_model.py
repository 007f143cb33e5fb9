"""A Hugging Face causal language model, and how it reads ragged texts: left-aligned, in its own forward.

In a left-aligned text the column is the position and the filling stands on the right, where a causal model never looks.
So the forward needs no mask and no position ids, and it is right for every causal architecture: windows, ALiBi,
recurrent layers, positions that a model counts by itself. Never samples, never changes the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.models.loading import (
    Shared,
    first_ids,
    load_causal_lm,
    load_config,
    load_stop_token_ids,
    load_tokenizer,
    refuse_adapters,
)
from textenv.state import left_aligned


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and the tokens that end a response.

    As the reference of an environment it is frozen, and in eval mode. The policy to start from is a copy of it:
    `copy.deepcopy(reference.model).requires_grad_(True)`, left in eval mode, where there is no dropout. That is what
    `python -m agents train` starts from. What comes out is in the folder `actor` of a run, and opens here like what
    `python -m agents supervised` writes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        """Load a frozen model with its tokenizer from a folder or hub name, as the setting `reference` does.

        Loaded once per process: copy `model` before you train it. Raises ValueError for a name that holds none.
        """
        load_config(str(name))  # raises for what is no model, which a tokenizer would report in other words
        tokenizer = load_tokenizer(str(name))
        model = load_causal_lm(str(name), torch.device(device), dtype)
        return cls(model, tokenizer, load_stop_token_ids(str(name), tokenizer))

    @property
    def vocabulary(self) -> int:
        """V, the width of the model's logits."""
        return output_width(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device


def shared(value: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Shared:
    """Pass a live object to `gym.make` without the copies that Gymnasium makes: a reward, a mask, a list, a model.

    tokenizer: of a Transformers model that is to be the reference, which ends its responses with the tokens of its
    generation config, else of its config or of the tokenizer. A `LanguageModel` has its tokenizer already.

        gym.make("TextGen-v0", reference=textenv.shared(model.eval(), tokenizer), reward=..., prompts=[...])
    """
    if tokenizer is None:
        return Shared(value)
    refuse_adapters("the model beside a tokenizer", value)
    if not value.can_generate():
        raise ValueError(
            f"a {type(value).__name__} beside a tokenizer is no language model; give a causal one, or share a reward "
            "model without a tokenizer."
        )
    ends = getattr(value.generation_config, "eos_token_id", None), value.config.get_text_config().eos_token_id
    return Shared(LanguageModel(value, tokenizer, first_ids(*ends, tokenizer.eos_token_id)))


def output_width(model: PreTrainedModel) -> int:
    """V, the width of a causal model's logits."""
    head: Any = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]


def read(model: PreTrainedModel, input_ids: Tensor, positions: Tensor, **cache: Any) -> tuple[Tensor, Tensor]:
    """A causal model's logits at some positions of left-aligned texts, and the hidden states that its head reads there.

    input_ids: int64 [B, T]; positions: int64 [B, K]; cache: arguments of the forward, by default no cache. Returns
    [B, K, V] and [B, K, H].
    """
    logits, hidden = at_head(model, input_ids, lambda hidden: at_positions(hidden, positions), **cache)
    return logits, at_positions(hidden, positions)


def at_head(
    model: PreTrainedModel, input_ids: Tensor, put: Callable[[Tensor], Tensor] | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """A model's own forward with another input to its head, whose logits of whole texts would not fit in memory.

    So soft caps and logit scales apply. put: from the head's input [B, T, H] to the one it gets, [B, K, H]; by default
    the first token's alone, for callers who need no logits. Returns logits [B, K, V], and the head's input as it was.
    """
    inputs: list[Tensor] = []
    reader = threading.get_ident()  # frozen models are shared, and other threads may be reading

    def replace(head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != reader:
            return given
        inputs.append(given[0])
        return (given[0][:, :1] if put is None else put(given[0]), *given[1:])

    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(replace)
    try:
        logits: Tensor = model(input_ids=input_ids, **(arguments or {"use_cache": False})).logits
    finally:
        hook.remove()
    return logits, inputs[0]


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, T, H] at positions [B, K]. Returns [B, K, H]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def read_states(input_ids: Tensor, attention_mask: Tensor, prompt_width: int, states: int) -> tuple[Tensor, Tensor]:
    """What a model reads of left-padded texts [B, L] for the states s_0, s_1, ... of their responses.

    Returns left-aligned ids, int64 [B, T], and the position of each state's last token, int64 [B, states]. A state
    after the end of a text gets the text's last token.
    """
    ids, length = left_aligned(input_ids, attention_mask)
    prompts = attention_mask[:, :prompt_width].sum(1)  # [B]
    steps = torch.arange(states, device=ids.device)
    return ids, (prompts[:, None] - 1 + steps).minimum(length[:, None] - 1).clamp_min(0)


def response_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> Tensor:
    """Logits that predict the response columns P..L-1 of left-padded texts [B, L]. Returns [B, R, V]."""
    ids, positions = read_states(input_ids, attention_mask, prompt_width, input_ids.shape[1] - prompt_width)
    last = max(ids.shape[1] - 2, 0)  # the last token of the longest text predicts nothing
    return read(model, ids[:, : last + 1], positions.clamp_max(last))[0]


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert the weights of a model in place, as if it had been loaded in that dtype.

    Buffers that are not saved stay as they are: rotary frequencies in bfloat16 would turn late positions by up to a
    radian.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal or classification model below its head, which gives hidden states.

    Raises ValueError if there is none.
    """
    named = model.base_model  # the model itself where `base_model_prefix` names nothing, as in Llama 4
    parts = [named, *(child for child in model.children() if isinstance(child, PreTrainedModel))]
    backbone = next((part for part in parts if part is not model), None)
    if not isinstance(backbone, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} has no backbone below its head, so it cannot be read for values or scores; use a "
            "model of another architecture."
        )
    return backbone


def hidden_states(backbone: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """A causal backbone's last hidden states at some positions of left-aligned texts.

    input_ids: int64 [B, T]; positions: int64 [B, K]. Returns [B, K, H].
    """
    return at_positions(backbone(input_ids=input_ids, use_cache=False).last_hidden_state, positions)


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a model has positions for; None if its configuration names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit <= 0:  # XLNet says -1 for any length
        return None
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    for table in tables:
        # RoBERTa counts positions from its pad id on: the first rows of the table are never used.
        if table.num_embeddings == limit and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return limit
