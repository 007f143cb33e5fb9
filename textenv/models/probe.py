"""Numeric checks of a loaded model: it reads ragged texts as it would read each alone, or it is refused in a sentence.

Three texts of different lengths, one as long as the task allows, so windows and positions are crossed where the task
crosses them. The oracle is a bare forward of one text: no batch, no filling, no cache. A check costs a few forwards,
once per model and process.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.models.comparison import bound, largest_difference, relative_difference, sample_texts
from textenv.models.decoding import decodes_from_cache
from textenv.models.language_model import hidden_states, output_width, read
from textenv.state import left_aligned

WHOLE = 64  # tokens of the longest text of which a check forms all logits: 64 MiB with a vocabulary of 262,144

_right_at: WeakKeyDictionary[PreTrainedModel, set[int]] = WeakKeyDictionary()  # model -> widths that were checked


def check_causal(model: PreTrainedModel, role: str, width: int) -> None:
    """Raise ValueError if a model is wrong as a causal language model of texts of at most `width` tokens.

    role: the model's name in messages, such as "reference".
    """
    if width in _right_at.setdefault(model, set()):
        return
    refuse = Refusal(model, role)
    with torch.no_grad():
        ids, positions = _sample_positions(output_width(model), width, model.device)
        logits = refuse.failing(lambda: read(model, ids, positions)[0])
        if logits.shape[-1] != output_width(model):
            raise refuse(f"its logits are {logits.shape[-1]} wide, and its head {output_width(model)}")
        if not bool(logits.isfinite().all()):
            raise refuse(
                f"its logits are not finite in {model.dtype}", "Check its weights, or load it with dtype='float32'."
            )
        alone = refuse.failing(lambda: _each_prefix(model, ids, positions))
        _compare(refuse, logits, alone, model.dtype)
        if relative_difference(read(model, ids, positions)[0], logits) > bound(model.dtype):
            raise refuse("two forwards of one text differ, so it draws noise in eval mode")
    decodes_from_cache(model, width)
    _right_at[model].add(width)


def check_backbone(model: PreTrainedModel, role: str, width: int, vocabulary: int) -> int:
    """The width of a causal backbone's hidden states. Raises ValueError if it reads ragged texts wrongly.

    vocabulary: the number of token ids that it takes.
    """
    refuse = Refusal(model, role)
    with torch.no_grad():
        ids, positions = _sample_positions(vocabulary, width, model.device)
        hidden = refuse.failing(lambda: hidden_states(model, ids, positions))
        alone = refuse.failing(lambda: _each_prefix(model, ids, positions, hidden=True))
        if hidden.shape != alone.shape:
            raise refuse("its hidden states have another shape for several texts than for one")
        if not bool(hidden.isfinite().all() & alone.isfinite().all()):
            raise refuse(f"its hidden states are not finite in {model.dtype}", "Check its weights.")
        if largest_difference(hidden, alone) > max(bound(model.dtype), 1e-4):
            raise refuse("its hidden states change with the later tokens or with the other texts of a batch")
    return hidden.shape[-1]


class Refusal:
    """Makes the errors of one model."""

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.model = model
        self.subject = f"the {role} is a {type(model).__name__} ({model.config.model_type})"

    def __call__(self, what: str, remedy: str = "Use a causal language model of another architecture.") -> ValueError:
        """The error that says what is wrong and what to do."""
        return ValueError(f"{self.subject}: {what}. {remedy}")

    def failing(self, forward: Any) -> Tensor:
        """The result of a forward; whatever it raises becomes a refusal."""
        try:
            return forward()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the architecture may raise anything
            line = (str(error).strip().splitlines() or [""])[0]
            raise self(f"its forward fails on texts of plain tokens ({type(error).__name__}: {line})") from error


def _compare(refuse: Refusal, logits: Tensor, alone: Tensor, dtype: torch.dtype) -> None:
    """Refuse logits [3, K, V] that are not those of each text alone, cut at its position."""
    difference = relative_difference(logits, alone)
    if difference <= bound(dtype):
        return
    config: Any = refuse.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic") and limit:
        raise refuse(
            f"it switches its rotary frequencies after {limit} tokens, for the whole text, so the probabilities of a "
            "long response are not those under which its tokens were chosen",
            f"Lower max_prompt_tokens + max_new_tokens, or where it is trained on data max_length, to {limit}.",
        )
    raise refuse(
        f"its logits at a token change with later tokens or with the other texts of a batch (by {difference:.0%} of "
        "their spread), so it is not causal",
        "Use a causal language model (an encoder such as BERT would need is_decoder=True, and training as one).",
    )


def _sample_positions(vocabulary: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Three left-aligned texts, the first of `width` tokens, and an early, a middle and the last position of each.

    Returns int64 [3, width] and [3, 3].
    """
    texts = sample_texts(vocabulary, width, 0, device)
    ids, length = left_aligned(texts.input_ids, texts.attention_mask)
    last = length - 1
    return ids, torch.stack([last.clamp_max(2), last // 2, last], 1)


def _each_prefix(model: PreTrainedModel, ids: Tensor, positions: Tensor, hidden: bool = False) -> Tensor:
    """The logits (or hidden states) after each position, from a bare forward of the text up to it. [3, K, ...].

    All logits of a long text would not fit in memory, so there the head reads the last token alone. That this is the
    same shows in the shorter texts.
    """

    def bare(row: int, position: int) -> Tensor:
        text = ids[row : row + 1, : position + 1]
        if position >= WHOLE and not hidden:
            return read(model, text, ids.new_tensor([[position]]))[0][0, 0]
        output: Any = model(input_ids=text, use_cache=False)
        return (output.last_hidden_state if hidden else output.logits)[0, -1]

    rows = [[bare(row, position) for position in row_positions] for row, row_positions in enumerate(positions.tolist())]
    return torch.stack([torch.stack(row) for row in rows])
