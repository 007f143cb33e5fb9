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
    def of(dense: Tensor) -> TokenSets:
        """Sets from a dense mask: bool [..., V], true = in the set."""
        inside = 2 * dense.sum(-1) <= dense.shape[-1]
        stored = torch.where(inside[..., None], dense, ~dense)  # [..., V]
        count = stored.sum(-1, keepdim=True)
        width = int(count.max()) if count.numel() else 0
        ids = torch.argsort(stored.int(), dim=-1, descending=True, stable=True)[..., :width].int()
        return TokenSets(ids.where(torch.arange(width, device=ids.device) < count, -1), inside)

    def dense(self, vocabulary: int) -> Tensor:
        """Bool [..., V], true = in the set."""
        shape = (*self.ids.shape[:-1], vocabulary + 1)  # the extra column takes the padding
        marked = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        marked.scatter_(-1, self.ids.long().where(self.ids >= 0, vocabulary), True)
        return marked[..., :vocabulary] == self.inside[..., None]

    @staticmethod
    def stack(steps: Sequence[TokenSets]) -> TokenSets:
        """Join the sets of R steps, [B] each, to sets of shape [B, R]."""
        width = max(step.ids.shape[-1] for step in steps)
        ids = [torch.nn.functional.pad(step.ids, (0, width - step.ids.shape[-1]), value=-1) for step in steps]
        return TokenSets(torch.stack(ids, 1), torch.stack([step.inside for step in steps], 1))

    def scatter(self, rows: Tensor, count: int) -> TokenSets:
        """Sets of `count` rows: these sets at the indices `rows` [b], and all tokens in the other rows."""
        ids = self.ids.new_full((count, self.ids.shape[-1]), -1)
        inside = self.inside.new_zeros(count)
        return TokenSets(ids.index_copy(0, rows, self.ids), inside.index_copy(0, rows, self.inside))
