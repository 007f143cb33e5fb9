"""The tokenizer of the embedded task: byte-level BPE of 1024 entries, so any UTF-8 text goes there and back."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
END, PAD = "<|endoftext|>", "<|pad|>"
MAX_LENGTH = 128  # positions of the models that go with it


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly 1024 entries: 256 bytes, merges learnt from the texts, the end and the pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(
            f"the tokenizer needs texts with enough different words for {VOCABULARY} entries; these gave "
            f"{tokenizer.get_vocab_size()}. Train it on the whole corpus."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",  # prompts are padded on the left, so that responses start in one column
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
