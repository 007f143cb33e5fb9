"""Decoding of single tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character
# Byte-level vocabularies (GPT-2's) spell each byte as a character: printable ones as themselves, others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + at): byte for at, byte in enumerate(OTHERS)}


class TokenTexts:
    """The text of each token by itself, with its leading space; "" for special tokens.

    Concatenated, the texts are the response, except for characters of several tokens: each part is "\ufffd".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[int, str] = {}
        # Some tokenizers (SentencePiece) drop a text's first space, so each token is decoded after an anchor token.
        special = set(tokenizer.all_special_ids)
        ordinary = (
            token for token in range(len(tokenizer)) if token not in special and self._decode([token]).strip().isalnum()
        )
        self.anchor = list(islice(ordinary, 1))
        self.anchor_length = len(self._decode(self.anchor))

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """The text of each id, in order."""
        return [self._text(token) for token in ids]

    def _text(self, token: int) -> str:
        if token not in self.cache:
            self.cache[token] = self._decode([*self.anchor, token])[self.anchor_length :]
        return self.cache[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenNames:
    r"""What each token is called where it stands by itself, never "".

    Its text, with its leading space; bytes that are no whole character as `\xe2`; of special tokens and of ids that the
    tokenizer does not have their names, such as `<end>` or `[299]`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.texts = tokenizer, TokenTexts(tokenizer)
        self.special = set(tokenizer.all_special_ids)
        self.cache: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """The name of each id, in order."""
        return [self._name(token) for token in ids]

    def is_special(self, token: int) -> bool:
        """Whether a token has a name only, and no text."""
        return token in self.special or self._stored(token) is None

    def _name(self, token: int) -> str:
        if token not in self.cache:
            stored = self._stored(token)
            text = "" if self.is_special(token) else self.texts([token])[0]
            self.cache[token] = f"[{token}]" if stored is None else _with_bytes(text, stored) or stored
        return self.cache[token]

    def _stored(self, token: int) -> str | None:
        """As the vocabulary spells it; None outside of it."""
        stored: Any = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        return stored


def _with_bytes(text: str, stored: str) -> str:
    r"""The text of a token, with bytes that are no whole character as `\xe2`, where its spelling tells them."""
    if REPLACEMENT not in text:
        return text
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", stored):  # SentencePiece
        return f"\\x{byte[1].lower()}"
    if all(character in BYTES for character in stored):  # GPT-2
        return bytes(BYTES[character] for character in stored).decode("utf-8", "backslashreplace")
    return text
