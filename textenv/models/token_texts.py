"""Decoding of single tokens."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from transformers import PreTrainedTokenizerBase


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
