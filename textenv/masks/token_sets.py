"""Sets of tokens for every position of a rollout, kept as indices: what a mask allowed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSets:
    """Sets of tokens for every position of a rollout, as the ids of the smaller side: in it, or not in it."""

    ids: Tensor  # int32 [..., K], filled up with -1
    inside: Tensor  # bool [...], true = the ids are the set, false = all others are

    @staticmethod
    def of(dense: Tensor) -> TokenSets:
        """dense: bool [..., V], true = in the set."""
        inside = 2 * dense.sum(-1) <= dense.shape[-1]
        listed = torch.where(inside[..., None], dense, ~dense)
        count = listed.sum(-1, keepdim=True)
        width = int(count.max()) if count.numel() else 0
        ids = torch.argsort(listed.int(), dim=-1, descending=True, stable=True)[..., :width].int()
        return TokenSets(ids.where(torch.arange(width, device=ids.device) < count, -1), inside)

    def dense(self, vocabulary: int) -> Tensor:
        """Bool [..., V], true = in the set."""
        shape = (*self.ids.shape[:-1], vocabulary + 1)  # a last column takes the filling
        marked = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        marked.scatter_(-1, self.ids.long().where(self.ids >= 0, vocabulary), True)
        return marked[..., :vocabulary] == self.inside[..., None]

    @staticmethod
    def stack(steps: Sequence[TokenSets]) -> TokenSets:
        """Sets of [B] rows at R steps as sets of [B, R]."""
        width = max(step.ids.shape[-1] for step in steps)
        ids = [torch.nn.functional.pad(step.ids, (0, width - step.ids.shape[-1]), value=-1) for step in steps]
        return TokenSets(torch.stack(ids, 1), torch.stack([step.inside for step in steps], 1))

    def scatter(self, rows: Tensor, count: int) -> TokenSets:
        """Sets of `count` rows: these at the indices `rows` [b], and all tokens elsewhere."""
        ids = self.ids.new_full((count, self.ids.shape[-1]), -1)
        inside = self.inside.new_zeros(count)
        return TokenSets(ids.index_copy(0, rows, self.ids), inside.index_copy(0, rows, self.inside))
