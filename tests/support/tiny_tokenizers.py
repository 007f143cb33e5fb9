"""One tiny tokenizer of each kind, with the tokens that such tokenizers put around a text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat .", "a dog ran : it is late", "two words more", "The cat is good ; the dog is bad :"]


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: `[CLS] text [SEP]`, words split without their spaces."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    raw.decoder = decoders.WordPiece()  # type: ignore[assignment]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials))
    _surround(raw, "[CLS]", "[SEP]")
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def metaspace(start: str = "<s>", end: str = "</s>", pad: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's: a space before the first word, `<s> text </s>` around it; "" adds nothing on that side."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    raw.decoder = decoders.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)  # type: ignore[call-arg]
    raw.train_from_iterator(CORPUS, trainer)
    _surround(raw, start, end)
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def byte_level(start: str = "", end: str = "<end>") -> PreTrainedTokenizerFast:
    """GPT-2's bytes with merges; appends its end token, as some converted tokenizers do."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=290,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    _surround(raw, start, end)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<end>", eos_token="<end>")


def words(start: str = "<s>", end: str = "</s>", unknown: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """Whole words and no letters: "a" is an unknown word here, which is an error where there is no token for it."""
    names = ["<s>", "</s>", "<unk>", "the", "cat", "sat"]
    raw = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    _surround(raw, start, end)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token=unknown)


def _surround(raw: Tokenizer, start: str, end: str) -> None:
    if start or end:
        ids = [(name, raw.token_to_id(name)) for name in {start, end} if name]
        template = f"{start} $A {end}".strip()
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)  # type: ignore[assignment]
