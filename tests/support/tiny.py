"""Tiny real models for tests: a byte-level tokenizer, GPT-2 and Llama with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300  # 256 bytes, two special tokens, and 42 ids that the tokenizer never writes
END, PAD = 256, 257
PROMPTS = ["a", "the cat", "two words more", "it is late"]

GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY)
# Dropout is on in these configurations: the loaders must switch it off.
GPT2_DROPOUT = dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=VOCABULARY,
)


def tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Bytes as tokens, with an end token; `pad="<end>"` makes the pad token the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<end>": END, "<pad>": PAD}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token=pad)


def sentencepiece_tokenizer():
    """Whole words that carry their space in front, which decoding strips from the first word."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "▁sat", "s"]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


def _sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that attention, positions and padding all show in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


def language_model(kind: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A random causal language model."""
    torch.manual_seed(seed)
    ends = dict(eos_token_id=END, pad_token_id=PAD, bos_token_id=None)
    if kind == "gpt2":
        return _sharpen(GPT2LMHeadModel(GPT2Config(**GPT2, **GPT2_DROPOUT, **ends)))
    return _sharpen(LlamaForCausalLM(LlamaConfig(**LLAMA, **ends)))


def reward_model(kind: str = "gpt2", seed: int = 1, labels: int = 1) -> PreTrainedModel:
    """A random sequence-classification model."""
    torch.manual_seed(seed)
    ends = dict(eos_token_id=END, pad_token_id=PAD, num_labels=labels, bos_token_id=None)
    if kind == "gpt2":
        return _sharpen(GPT2ForSequenceClassification(GPT2Config(**GPT2, **GPT2_DROPOUT, **ends)))
    return _sharpen(LlamaForSequenceClassification(LlamaConfig(**LLAMA, **ends)))


def save(model: PreTrainedModel, folder: Path, pad: str = "<pad>") -> str:
    """Model and tokenizer in one folder, as a user would have them."""
    model.save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return str(folder)
