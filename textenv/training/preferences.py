"""What a reward model reads of preferences and of labeled texts (data.py): token sequences, targets and margins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textenv.models.encoding import check_ids
from textenv.training.data import Row, encode_exchanges, kind_of

Tokens = Sequence[int]


class Pair(NamedTuple):
    """A tokenized preference."""

    chosen: Tokens
    rejected: Tokens
    margin: float = 0.0  # by how much the score of the chosen one should exceed that of the rejected one


@dataclass(frozen=True)
class Pairs:
    """Tokenized preferences: in each row, the first sequence is preferred to the second."""

    rows: list[Pair]

    def sequences(self) -> list[Tokens]:
        """The B chosen sequences, then the B rejected ones."""
        return [pair.chosen for pair in self.rows] + [pair.rejected for pair in self.rows]

    def targets(self) -> Tensor:
        """Targets of the logits, all 1. Returns [B]."""
        return torch.ones(len(self.rows))

    def logits(self, scores: Tensor) -> Tensor:
        """Log-odds of the preferences under Bradley-Terry. scores: [2B, K], chosen first. Returns [B, K]."""
        chosen, rejected = scores.chunk(2)
        return chosen - rejected

    def margins(self) -> Tensor:
        """What the loss takes off the logits, [B]."""
        return torch.tensor([pair.margin for pair in self.rows])


@dataclass(frozen=True)
class Labeled:
    """Tokenized texts with label 0 (bad) or 1 (good)."""

    rows: list[tuple[Tokens, int]]

    def sequences(self) -> list[Tokens]:
        """The B tokenized texts."""
        return [tokens for tokens, _ in self.rows]

    def targets(self) -> Tensor:
        """Targets of the logits, 0 or 1. Returns [B]."""
        return torch.tensor([float(label) for _, label in self.rows])

    def logits(self, scores: Tensor) -> Tensor:
        """Log-odds of label 1. scores: [B, K]. Returns [B, K]."""
        return scores

    def margins(self) -> Tensor:
        """Labels have no margins: zeros, [B]."""
        return torch.zeros(len(self.rows))


Examples = Pairs | Labeled


_FIELDS = {"pairs": ("chosen", "rejected"), "labeled": ("text",)}  # what is scored in each kind of row


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    vocabulary: int,
    stops: Collection[int] = (),
) -> Examples:
    """Tokenize rows: prompt, space and text, end token, or chats; at most the last `max_length` tokens.

    stops: tokens that end a response of a chat. Raises ValueError for a token that a model of `vocabulary` ids has no
    row for.
    """
    columns = []
    for name in _FIELDS[kind_of(rows[0])]:
        exchanges = [(row.get("prompt"), row[name]) for row in rows]
        columns.append([each.ids[-max_length:] for each in encode_exchanges(tokenizer, exchanges, stops)])
        check_ids(
            tokenizer, columns[-1], vocabulary, lambda i, name=name: f"the {name} text {str(rows[i][name])[:60]!r}"
        )
    if len(columns) == 2:
        margins = [float(row.get("margin", 0.0)) for row in rows]
        return Pairs([Pair(*row) for row in zip(*columns, margins, strict=True)])
    return Labeled([(ids, int(row["label"])) for ids, row in zip(columns[0], rows, strict=True)])
