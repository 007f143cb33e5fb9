"""A response as text for a terminal, with the value of each token as its color.

Pure functions of an `EpisodeView`, which holds everything that is displayed of one row. Images are in picture.py;
viewers.py connects both to the environments.
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

REPLACEMENT = "\ufffd"  # what decoders write for invalid or incomplete characters
PROMPT_COLOR = 244  # gray, of the 256 terminal colors
# Weak, medium and strong, of the 256 terminal colors. Each has a contrast (WCAG) of at least 3.4 to 1 against black
# and against white, so that it is legible on dark and light terminals.
NEGATIVE_COLORS, POSITIVE_COLORS = (67, 33, 27), (131, 167, 160)  # blues and reds
# Control codes are displayed as ^C: text from a model must not control the user's terminal.
CONTROLS: dict[int, str] = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys(range(128, 160), REPLACEMENT)


@dataclass(frozen=True, kw_only=True)
class EpisodeView:
    """Everything that is displayed of one row."""

    prompt: str
    pieces: Sequence[str]  # the text that each response token adds
    values: Sequence[float] | None = None  # one number per token, shown as its color; None shows no color
    scale: float = 1.0  # the magnitude at which colors reach full strength
    unit: str = ""  # of the values, for the legend
    footer: Sequence[str] = ()  # short items below the text
    progress: float = 0.0  # share of the token budget that is used, from 0 to 1


class TextStreamer:
    """Decodes tokens one by one. Each call returns the text that the token adds, never part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.prompt = self._decode()
        # Characters returned so far; tokens since the text last ended in a whole character.
        self._emitted, self._pending = len(self.prompt), 0

    def add(self, token: int) -> str:
        """The text that this token adds. A character of several tokens is returned with the last of them."""
        self.ids.append(token)
        text = self._decode()
        replacements = len(text) - len(text.rstrip(REPLACEMENT))
        self._pending = self._pending + 1 if replacements else 0
        if 0 < self._pending < 4:  # a character has at most four bytes, each of which may be a token
            return ""
        # After four tokens the bytes are invalid, but the last three may still start a character.
        return self._emit(text[: len(text) - min(3, replacements)])

    def flush(self) -> str:
        """The text held back as an incomplete character, after the last token."""
        return self._emit(self._decode())

    def _emit(self, text: str) -> str:
        added, self._emitted = text[self._emitted :], max(self._emitted, len(text))
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
    """One row as terminal text: the prompt in gray, and each response token in the color of its value.

    values: [R], or one per token (list, array or tensor), for instance penalties or advantages. Negative values are
    blue, positive values red, and values near zero have the terminal's default color. scale: the magnitude at which
    colors reach full strength, by default the largest magnitude among the values.
    """
    return paint(make_view(state, row, tokenizer, values, scale))


def make_view(
    state: TextState, row: int, tokenizer: PreTrainedTokenizerBase, values: Any = None, scale: float | None = None
) -> EpisodeView:
    """The view of one row of a state. `values`, `scale`: as in `ansi`. Raises ValueError for too few values or NaN."""
    width, length = state.prompt_width, int(state.length[row])
    ids, mask = state.input_ids[row].cpu(), state.attention_mask[row].cpu()
    streamer = TextStreamer(tokenizer, ids[:width][mask[:width]].tolist())
    pieces = [streamer.add(token) for token in ids[width : width + length].tolist()]
    if pieces:
        pieces[-1] += streamer.flush()
    numbers = None if values is None else _check_values(values, length)
    finite = [abs(number) for number in numbers or () if math.isfinite(number)]
    scale = max(finite, default=0.0) if scale is None else scale
    return EpisodeView(prompt=printable(streamer.prompt), pieces=pieces, values=numbers, scale=scale or 1.0)


def paint(view: EpisodeView) -> str:
    """A view as text for a terminal with 256 colors; plain text if NO_COLOR is set (no-color.org)."""
    return color(view.prompt, PROMPT_COLOR) + "".join(color(text, code) for text, code in _color_runs(view))


def color(text: str, code: int | None) -> str:
    """Text in one of 256 terminal colors, or in the default color (None)."""
    if code is None or not text or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def shade(value: float, scale: float) -> int | None:
    """The terminal color of a value: None near zero, then three steps of blue or red."""
    level = round(3 * min(abs(value) / scale, 1.0))
    return None if level == 0 else (NEGATIVE_COLORS if value < 0 else POSITIVE_COLORS)[level - 1]


def printable(text: str) -> str:
    """Replace control codes by visible characters, except line breaks and tabs."""
    return text.translate(CONTROLS)


def _color_runs(view: EpisodeView) -> Iterator[tuple[str, int | None]]:
    """Merge neighboring pieces of the same color."""
    codes = [None] * len(view.pieces) if view.values is None else [shade(value, view.scale) for value in view.values]
    for code, run in groupby(zip(view.pieces, codes, strict=True), key=lambda pair: pair[1]):
        yield "".join(piece for piece, _ in run), code


def _check_values(values: Any, length: int) -> list[float]:
    numbers = torch.as_tensor(values).detach().flatten().tolist()
    if len(numbers) < length:
        raise ValueError(f"values must have one number for each of the response's {length} tokens, got {len(numbers)}.")
    if any(math.isnan(number) for number in numbers[:length]):
        raise ValueError(
            f"values must be numbers, got NaN at token {[math.isnan(number) for number in numbers].index(True)}."
        )
    return numbers[:length]
