"""Tiny GPT-2s with weights by formula, so that an oracle's numbers depend on no file and no random generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def wave(shape: Sequence[int], phase: float) -> Tensor:
    """sin(0.7 n² + phase) for the n-th entry, counted from 0 over the flattened tensor. Float64."""
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * place.square() + phase).reshape(shape)


def language_model(sizes: Mapping[str, Any], phase: float = 0.0) -> PreTrainedModel:
    """The policy and its reference, which may have a phase of its own."""
    return _by_formula(GPT2LMHeadModel(GPT2Config(**sizes)), phase)


def classifier(sizes: Mapping[str, Any]) -> PreTrainedModel:
    """The reward model."""
    return _by_formula(GPT2ForSequenceClassification(GPT2Config(num_labels=1, **sizes)), 2.0)


def _by_formula(model: PreTrainedModel, phase: float) -> PreTrainedModel:
    """Every matrix a wave; biases stay 0 and layer norms stay 1, as GPT-2 initializes them."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                embeds = parameter.shape[0] == model.config.vocab_size
                parameter.copy_((0.4 if embeds else 0.25) * wave(parameter.shape, phase + index))
    return model.eval()


def word_tokenizer(end: int, pad: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Words that name their own ids: "w5 w9" is [5, 9]."""
    words = {f"w{index}": index for index in range(vocabulary)}
    words = {word: index for word, index in words.items() if index not in (end, pad)} | {"<end>": end, "<pad>": pad}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")


def words(ids: Sequence[int]) -> str:
    """The text of some ids, for `word_tokenizer`."""
    return " ".join(f"w{index}" for index in ids)


def projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two numbers per tensor, its inner products with two waves: a wrong entry anywhere moves them."""
    return {
        name: torch.stack([(tensor.double() * wave(tensor.shape, phase)).sum() for phase in (0.0, 1.0)])
        for name, tensor in tensors.items()
    }


def length_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that needs no model: the number of characters."""
    return [float(len(response)) for response in responses]
