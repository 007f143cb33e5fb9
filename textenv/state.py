"""The state of a batch of texts: tokens, masks, lengths, and the rule that ends a response.

A state is a value: every operation returns a new state and leaves the old one as it was. `own_settings` keeps its
numbers independent of what the caller has set in torch.
Letters in shape comments, here and everywhere: B rows, P prompt width, R response width, L = P + R, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How a response ended, as codes that fit in a tensor; `FINISH_REASONS[code]` is the name in `info`.
RUNNING, STOP, LENGTH = 0, 1, 2
FINISH_REASONS = ("", "stop", "length")

# Tokens that a model reads in one forward, padding included: few enough for a processor's cache, and for rows of nearly
# one length; enough to keep another device busy.
CPU_TOKENS, OTHER_TOKENS = 1024, 16384


@contextmanager
def own_settings(*, gradients: bool = False) -> Iterator[None]:
    """Torch's defaults, whatever the caller has set: also a decorator, for every function that users call.

    The caller may be in `inference_mode`, whose tensors could never be written again, in `no_grad` or in `autocast`,
    and may have set another default dtype or device. None of that may change a number here, or outlast the call.
    gradients: whether operations are recorded for `backward`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) is not torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@dataclass(frozen=True)
class TextState:
    """Contexts `x, y_<t` of a batch: prompts left-padded to P, responses from column P on.

    Two masks. `attention_mask` marks the tokens of the text: models read them, and positions count them.
    `generated` marks those of them that the policy chose: actions, log-probabilities, rewards and losses exist only
    there. A response may hold tokens that the policy did not write.
    """

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor  # bool [B, L], true = a token, false = padding
    generated: Tensor  # bool [B, L], true = written by the policy
    length: Tensor  # int64 [B], tokens in the response, generated or not; the next token goes to column P + length
    prompt_width: int  # P

    @classmethod
    def from_masks(cls, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> TextState:
        """The state of stored texts.

        input_ids: int64 [B, L]; attention_mask: bool [B, L]; response_mask: bool [B, R], true = generated.
        """
        width = input_ids.shape[1] - response_mask.shape[1]
        generated = torch.nn.functional.pad(response_mask, (width, 0))  # [B, L]
        return cls(input_ids, attention_mask, generated, attention_mask[:, width:].sum(1), width)

    @property
    def response_ids(self) -> Tensor:
        """All response columns, int64 [B, R]."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """Bool [B, R], true = generated."""
        return self.generated[:, self.prompt_width :]

    @property
    def generated_length(self) -> Tensor:
        """Tokens that the policy wrote, int64 [B]: the number of steps so far."""
        return self.generated.sum(1)

    @property
    def last_generated(self) -> Tensor:
        """Bool [B, R], true at the last generated token of each row: where the final score is paid."""
        mask = self.response_mask
        return mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        """The last token of each text, and its position: int64 [B] both. An empty text has any token, at position 0."""
        columns = self.prompt_width + self.length[:, None] - 1
        return self.input_ids.gather(1, columns)[:, 0], (self.attention_mask.sum(1) - 1).clamp_min(0)

    def select(self, rows: Tensor) -> TextState:
        """The state of some rows (indices or a boolean mask)."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            generated=self.generated[rows],
            length=self.length[rows],
        )

    def append(self, tokens: Tensor, active: Tensor, generated: bool = True) -> TextState:
        """The state with one more token in every active row.

        tokens: int64 [B]; active: bool [B]; generated: whether the policy wrote the tokens.
        """
        column = (self.prompt_width + self.length).where(active, 0)[:, None]  # [B, 1]

        def put(values: Tensor, new: Tensor) -> Tensor:
            return values.scatter(1, column, new[:, None].where(active[:, None], values.gather(1, column)))

        return replace(
            self,
            input_ids=put(self.input_ids, tokens),
            attention_mask=put(self.attention_mask, active),
            generated=put(self.generated, torch.full_like(active, generated)),
            length=self.length + active,
        )

    def restart(self, rows: Tensor, fresh: TextState) -> TextState:
        """The state with the rows of indices `rows` [b] replaced by `fresh`, which has b rows."""
        state = replace(
            self,
            input_ids=self.input_ids.clone(),
            attention_mask=self.attention_mask.clone(),
            generated=self.generated.clone(),
            length=self.length.clone(),
        )
        state.input_ids[rows], state.attention_mask[rows] = fresh.input_ids, fresh.attention_mask
        state.generated[rows], state.length[rows] = fresh.generated, fresh.length
        return state


def start(prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, pad_token_id: int) -> TextState:
    """States before the first token, for left-padded prompts [B, P]."""
    rows, width = prompt_ids.shape
    empty = prompt_ids.new_full((rows, max_new_tokens), pad_token_id)  # [B, R]
    input_ids = torch.cat([prompt_ids, empty], 1)  # [B, L]
    return TextState(
        input_ids=input_ids,
        attention_mask=torch.cat([prompt_mask.bool(), torch.zeros_like(empty, dtype=torch.bool)], 1),  # [B, L]
        generated=torch.zeros_like(input_ids, dtype=torch.bool),  # [B, L]
        length=prompt_ids.new_zeros(rows),
        prompt_width=width,
    )


def finish(tokens: Tensor, length: Tensor, stop_token_ids: Tensor, max_new_tokens: int) -> Tensor:
    """How each response ends after its newest generated token. No other code decides this.

    tokens: int64 [B], the newest generated tokens; length: int64 [B], `TextState.length` with them. Returns int64 [B]
    of RUNNING, STOP and LENGTH.
    """
    code = torch.where(length >= max_new_tokens, LENGTH, RUNNING)
    stopped = (tokens[:, None] == stop_token_ids).any(1)  # isin may wait for the device
    return torch.where(stopped, STOP, code)


def left_aligned(input_ids: Tensor, attention_mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts as models read them: column = position, filling on the right.

    A causal model never sees the filling, so it needs neither a mask nor position ids. The filling repeats the last
    token of the text, because the pad token need not be one of the model's.

    input_ids: int64 [B, L]; attention_mask: [B, L], true or 1 = a token, contiguous in each row; width: T, at least the
    number of tokens of the longest text, for callers that know it: asking waits for the device. Returns ids, int64
    [B, T], where T is by default that number (at least 1), and the number of tokens of each text, int64 [B]. Raises
    ValueError for a batch without rows, which Transformers' attention does not take.
    """
    mask = attention_mask.bool()
    length = mask.sum(1)  # [B]
    if not len(length):
        raise ValueError("the batch has no texts, and models read one at least; pass one or more prompts or responses.")
    width = max(int(length.max()), 1) if width is None else width
    columns = torch.arange(width, device=length.device).minimum((length[:, None] - 1).clamp_min(0))
    return input_ids.gather(1, mask.int().argmax(1, keepdim=True) + columns), length


def pass_tokens(device: torch.device) -> int:
    """Tokens of one forward, padding included, where nobody says how many."""
    return CPU_TOKENS if device.type == "cpu" else OTHER_TOKENS


def batches(length: Tensor, tokens: int | None = None) -> list[Tensor]:
    """Texts of similar length together, so that rows times the longest text is at most `tokens` in each batch.

    length: int64 [B], tokens of each text; tokens: by default 1,024 on a CPU and 16,384 elsewhere. Returns row indices,
    int64 [b], shortest texts first; a text that is longer than `tokens` is a batch by itself.
    """
    if tokens is None:
        tokens = pass_tokens(length.device)
    if tokens < 1:
        raise ValueError(f"batches of texts hold at least 1 token, got {tokens}; give the tokens of one forward.")
    order = length.argsort(stable=True)
    sizes, size = [], 0
    for longest in length[order].tolist():
        if size and (size + 1) * longest > tokens:
            sizes.append(size)
            size = 0
        size += 1
    return list(order.split([*sizes, size]))


def in_batches(function: Callable[[Tensor], Tensor], length: Tensor, tokens: int | None) -> Tensor:
    """`function` of all rows, one of their `batches` at a time.

    function: takes row indices, int64 [b]; returns [b, ...]. Returns [B, ...], in the order of the rows.
    """
    parts = batches(length, tokens)
    return torch.cat([function(rows) for rows in parts])[torch.cat(parts).argsort()]
