"""A response as text for people: what each token adds, and each token's number as its color in a terminal.

Pure functions of a `EpisodeView`, which is all that is shown of one row. Pictures are in picture.py, and what the
environments do with both in viewers.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from textenv.state import TextState

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
PROMPT = 244  # gray of the terminal's 256 colors
# Weak, middling and strong, of the terminal's 256 colors: each is at least 3.4 to 1 in contrast (WCAG) to black
# and to white, so that they can be read on dark and light terminals.
BELOW, ABOVE = (67, 33, 27), (131, 167, 160)  # blues for numbers below zero, reds for those above
# The terminal's own control codes, shown as ^C: text that a model wrote must not steer anybody's terminal.
CONTROLS: dict[int, str] = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys(range(128, 160), REPLACEMENT)


@dataclass(frozen=True, kw_only=True)
class EpisodeView:
    """One row as it is shown."""

    prompt: str
    pieces: Sequence[str]  # what each response token adds to the text
    values: Sequence[float] | None = None  # one number a token, shown as its color; None shows none
    scale: float = 1.0  # the magnitude from which colors are at their strongest
    unit: str = ""  # what the numbers are, for a legend
    footer: Sequence[str] = ()  # short facts below the text
    progress: float = 0.0  # how much of the token budget is used, from 0 to 1


class TextStreamer:
    """Text from tokens that come one by one: what each adds, and never a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.prompt = self._decode()
        self._shown, self._waiting = len(self.prompt), 0  # letters shown; tokens since the text was last whole

    def type(self, token: int) -> str:
        """What this token adds. A character of several tokens comes out with the last of them."""
        self.ids.append(token)
        text = self._decode()
        replacements = len(text) - len(text.rstrip(REPLACEMENT))
        self._waiting = self._waiting + 1 if replacements else 0
        if 0 < self._waiting < 4:  # a character is at most four bytes, each of which may be a token
            return ""
        # Longer than that: broken bytes, of which the last three may still begin a character.
        return self._show(text[: len(text) - min(3, replacements)])

    def rest(self) -> str:
        """What was held back and never became a character, for when no more tokens come."""
        return self._show(self._decode())

    def _show(self, text: str) -> str:
        added, self._shown = text[self._shown :], max(self._shown, len(text))
        return printable(added)

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ansi(
    state: TextState,
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    values: Any = None,
    scale: float | None = None,
) -> str:
    """One row's text for a terminal: the prompt in gray, and any number a token as the token's color.

    values: [R], or as many as there are tokens (list, array or tensor): penalties, advantages, ... Below zero
    is blue, above is red, near zero is the terminal's own color. scale: the magnitude from which colors are
    at their strongest, by default the greatest among the values.
    """
    return paint(make_page(state, row, tokenizer, values, scale))


def make_page(
    state: TextState, row: int, tokenizer: PreTrainedTokenizerBase, values: Any = None, scale: float | None = None
) -> EpisodeView:
    """One row of a state as a page; `values` and `scale` as for `ansi`. Raises ValueError for too few or NaN."""
    width, length = state.prompt_width, int(state.length[row])
    ids, mask = state.input_ids[row].cpu(), state.attention_mask[row].cpu()
    typewriter = TextStreamer(tokenizer, ids[:width][mask[:width]].tolist())
    pieces = [typewriter.type(token) for token in ids[width : width + length].tolist()]
    if pieces:
        pieces[-1] += typewriter.rest()
    numbers = None if values is None else _numbers(values, length)
    finite = [abs(number) for number in numbers or () if math.isfinite(number)]
    scale = max(finite, default=0.0) if scale is None else scale
    return EpisodeView(prompt=printable(typewriter.prompt), pieces=pieces, values=numbers, scale=scale or 1.0)


def paint(page: EpisodeView) -> str:
    """A page for a terminal of 256 colors; plain text where the variable NO_COLOR is set (no-color.org)."""
    return color(page.prompt, PROMPT) + "".join(color(text, code) for text, code in _runs(page))


def color(text: str, code: int | None) -> str:
    """Text in one of a terminal's 256 colors, or in its own (None)."""
    if code is None or not text or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def shade(value: float, scale: float) -> int | None:
    """The color of a number among a terminal's 256: None near zero, then three steps of blue or red."""
    level = round(3 * min(abs(value) / scale, 1.0))
    return None if level == 0 else (BELOW if value < 0 else ABOVE)[level - 1]


def printable(text: str) -> str:
    """Text whose control codes are shown instead of obeyed; line ends and tabs stay."""
    return text.translate(CONTROLS)


def _runs(page: EpisodeView) -> Iterator[tuple[str, int | None]]:
    """Neighboring pieces of the same color as one."""
    codes = [None] * len(page.pieces) if page.values is None else [shade(one, page.scale) for one in page.values]
    for code, run in groupby(zip(page.pieces, codes, strict=True), key=lambda pair: pair[1]):
        yield "".join(piece for piece, _ in run), code


def _numbers(values: Any, length: int) -> list[float]:
    numbers = torch.as_tensor(values).detach().flatten().tolist()
    if len(numbers) < length:
        raise ValueError(f"values must hold a number for each of the response's {length} tokens, got {len(numbers)}.")
    if any(math.isnan(number) for number in numbers[:length]):
        raise ValueError(
            f"values must be numbers, got NaN at token {[math.isnan(one) for one in numbers].index(True)}."
        )
    return numbers[:length]
