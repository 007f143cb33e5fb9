"""The state of a batch of texts being written: tokens, masks, lengths, and when a response ends.

A state is a value: every operation returns a new one, so whoever kept an old one still has it.
Letters in shape comments, here and everywhere: B rows, P prompt width, R response width,
L = P + R, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How a response ended, as codes that fit in a tensor; `FINISH_REASONS[code]` is the name in `info`.
RUNNING, STOP, LENGTH = 0, 1, 2
FINISH_REASONS = ("", "stop", "length")


@dataclass(frozen=True)
class TextState:
    """Contexts `x, y_<t` of a batch: prompts left-padded to P, responses from column P on."""

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor  # bool [B, L], true = a real token
    length: Tensor  # int64 [B], response tokens so far
    prompt_width: int  # P

    @property
    def response_ids(self) -> Tensor:
        """int64 [B, R]."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """Bool [B, R], true = generated."""
        return self.attention_mask[:, self.prompt_width :]

    def select(self, rows: Tensor) -> TextState:
        """The given rows (indices or a boolean mask) alone."""
        return TextState(self.input_ids[rows], self.attention_mask[rows], self.length[rows], self.prompt_width)

    def append(self, tokens: Tensor, active: Tensor) -> TextState:
        """One token more in every active row.

        tokens: int64 [B]; active: bool [B].
        """
        rows = active.nonzero()[:, 0]
        columns = self.prompt_width + self.length[rows]
        input_ids, attention_mask = self.input_ids.clone(), self.attention_mask.clone()
        input_ids[rows, columns] = tokens[rows]
        attention_mask[rows, columns] = True
        return TextState(input_ids, attention_mask, self.length + active.long(), self.prompt_width)

    def restart(self, rows: Tensor, fresh: TextState) -> TextState:
        """The rows of indices `rows` [b] replaced by those of `fresh`, which has b rows."""
        input_ids, attention_mask = self.input_ids.clone(), self.attention_mask.clone()
        length = self.length.clone()
        input_ids[rows], attention_mask[rows], length[rows] = fresh.input_ids, fresh.attention_mask, fresh.length
        return TextState(input_ids, attention_mask, length, self.prompt_width)


def start(prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, pad_token_id: int) -> TextState:
    """States before the first token, for left-padded prompts [B, P]."""
    rows, width = prompt_ids.shape
    room = prompt_ids.new_full((rows, max_new_tokens), pad_token_id)
    return TextState(
        input_ids=torch.cat([prompt_ids, room], 1),  # [B, L]
        attention_mask=torch.cat([prompt_mask.bool(), torch.zeros_like(room, dtype=torch.bool)], 1),
        length=prompt_ids.new_zeros(rows),
        prompt_width=width,
    )


def finish(tokens: Tensor, length: Tensor, stop_token_ids: Tensor, max_new_tokens: int) -> Tensor:
    """How each response ends with the token just written: the one place that decides it.

    tokens: int64 [B]; length: int64 [B], the token included. Returns int64 [B] of RUNNING, STOP, LENGTH.
    """
    code = torch.where(length >= max_new_tokens, LENGTH, RUNNING)
    return torch.where(torch.isin(tokens, stop_token_ids), STOP, code)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding anywhere changes nothing.

    attention_mask: [B, L], true or one = real. Returns int64 [B, L].
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
