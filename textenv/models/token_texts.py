"""What each token says by itself."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """The text of each token by itself, with the space that it brings along; of special tokens, none.

    Put together they are the response, but for characters of several tokens, whose parts show as "\ufffd".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}
        # Some tokenizers (SentencePiece) drop the space in front of a text, so each token is read after another one.
        special = set(tokenizer.all_special_ids)
        ordinary = (
            one for one in range(len(tokenizer)) if one not in special and self._decode([one]).strip().isalnum()
        )
        self.anchor = list(islice(ordinary, 1))
        self.skipped = len(self._decode(self.anchor))

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Texts of these ids."""
        return [self._text(one) for one in ids]

    def _text(self, one: int) -> str:
        if one not in self.known:
            self.known[one] = self._decode([*self.anchor, one])[self.skipped :]
        return self.known[one]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
