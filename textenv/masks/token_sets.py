"""Compact storage of the masks of a rollout: one set of token ids for every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSets:
    """A set of tokens for every position, stored as the smaller side: the members, or the tokens left out.

    The width K is that of the largest stored side, so it is at most V / 2.
    """

    ids: Tensor  # int32 [..., K], padded with -1
    inside: Tensor  # bool [...], true = `ids` are the members, false = `ids` are all other tokens

    @staticmethod
    def of(dense: Tensor, width: int | None = None) -> TokenSets:
        """Sets from a dense mask: bool [..., V], true = in the set.

        width: K, at least the largest of `stored_sizes`, for callers that know it: asking waits for the device.
        """
        members, vocabulary = dense.sum(-1, keepdim=True), dense.shape[-1]
        inside = 2 * members <= vocabulary  # [..., 1]
        stored = dense == inside  # [..., V], the members, or the tokens left out
        if width is None:
            width = int(TokenSets.stored_sizes(dense).max()) if dense.numel() else 0
        place = (stored.cumsum(-1) - 1).where(stored, width)  # [..., V]; the extra column takes what is not stored
        tokens = torch.arange(vocabulary, dtype=torch.int32, device=dense.device).expand(dense.shape)
        ids = torch.full((*dense.shape[:-1], width + 1), -1, dtype=torch.int32, device=dense.device)
        return TokenSets(ids.scatter_(-1, place, tokens)[..., :width], inside[..., 0])

    @staticmethod
    def stored_sizes(dense: Tensor) -> Tensor:
        """The number of ids that each set of a dense mask [..., V] stores, int64 [...]."""
        members = dense.sum(-1)
        return members.minimum(dense.shape[-1] - members)

    def dense(self, vocabulary: int) -> Tensor:
        """Bool [..., V], true = in the set."""
        shape = (*self.ids.shape[:-1], vocabulary + 1)  # the extra column takes the padding
        marked = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        marked.scatter_(-1, self.ids.long().where(self.ids >= 0, vocabulary), True)
        return marked[..., :vocabulary] == self.inside[..., None]

    @staticmethod
    def collect(parts: Sequence[tuple[tuple[Tensor, Tensor], TokenSets]], shape: tuple[int, int]) -> TokenSets:
        """Sets of shape [N, R]: each part's b sets at their rows and columns, int64 [b] each; elsewhere all tokens."""
        first = parts[0][1]
        width = max(sets.ids.shape[-1] for _, sets in parts)
        ids = first.ids.new_full((*shape, width), -1)
        inside = first.inside.new_zeros(shape)
        for (rows, columns), sets in parts:
            ids[rows, columns, : sets.ids.shape[-1]] = sets.ids
            inside[rows, columns] = sets.inside
        return TokenSets(ids, inside)
