"""The tokenizer of the embedded task: byte-level BPE with 1024 entries, lossless for any UTF-8 text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
END, PAD = "<|endoftext|>", "<|pad|>"
MAX_LENGTH = 128  # positions of the embedded models


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly 1024 entries: 256 bytes, merges learned from the texts, an end and a pad token.

    Raises ValueError if the texts are too few for that many merges.
    """
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
            f"the tokenizer needs texts with enough different words for {VOCABULARY} entries; these texts gave "
            f"{tokenizer.get_vocab_size()}. Train it on the whole corpus."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",  # so that all responses start in the same column
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
