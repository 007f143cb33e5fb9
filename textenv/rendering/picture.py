"""Draw an `EpisodeView` as an image. All frames of an environment have the same size, so that they form a video.

The background color of a token shows its value, from blue (negative) through the page color (zero) to red (positive).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from textenv.rendering.text import EpisodeView

Color = tuple[int, int, int]
PAPER, INK, GRAY, FAINT = (252, 252, 250), (28, 30, 34), (128, 132, 140), (226, 227, 224)
BLUE, RED = (104, 164, 222), (240, 128, 108)  # background colors at full strength
WIDTH, MARGIN, LINE, FOOTER = 768, 28, 30, 52  # pixels
BLOCK = 16  # video codecs need sides that are multiples of this
FOOTER_ITEM = 160  # pixels from one footer item to the next, fixed so that items do not move in a video
MIN_LINES, MAX_LINES = 4, 24  # lines of text
CHARACTERS_PER_TOKEN, CHARACTERS_PER_LINE = 5, 70  # rough, to choose a height; longer text scrolls


@dataclass(frozen=True)
class Span:
    """Text with its position and colors."""

    text: str
    left: float  # pixels from the left margin
    line: int
    ink: Color
    background: Color | None


TextRun = tuple[str, Color, Color | None]  # text, ink, background


def lines_for(tokens: int) -> int:
    """The number of text lines in an image for texts of up to `tokens` tokens."""
    return min(max(math.ceil(tokens * CHARACTERS_PER_TOKEN / CHARACTERS_PER_LINE), MIN_LINES), MAX_LINES)


def draw(view: EpisodeView, lines: int) -> NDArray[np.uint8]:
    """Draw a view, uint8 [H, W, 3]. H depends only on `lines`; of longer texts the last lines are shown."""
    height = BLOCK * math.ceil((MARGIN + lines * LINE + FOOTER) / BLOCK)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    canvas = ImageDraw.Draw(image)
    spans = list(_layout(view))
    hidden = max(spans[-1].line + 1 - lines, 0) if spans else 0
    for span in spans:
        if span.line >= hidden:
            _draw_span(canvas, span, MARGIN + (span.line - hidden) * LINE)
    _draw_footer(canvas, view, height)
    return np.array(image)


def tint(value: float, scale: float) -> Color:
    """The background color of a value: the page color at zero, full blue or red from magnitude `scale` on."""
    strength = min(abs(value) / scale, 1.0)
    return _blend(PAPER, BLUE if value < 0 else RED, strength)


def _blend(start: Color, end: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _layout(view: EpisodeView) -> Iterator[Span]:
    """Break the text into lines: between words, or inside a word that is longer than a line."""
    left, line, limit = 0.0, 0, WIDTH - 2 * MARGIN
    wrapped = False  # whether the current line continues a full one; then its leading spaces are dropped
    for word in _words(view):
        width = sum(_width(text) for text, _, _ in word)
        if left and left + width > limit:
            left, line, wrapped = 0.0, line + 1, True
        for text, ink, background in word:
            for part in [text] if width <= limit else text:
                if part == "\n":
                    left, line, wrapped = 0.0, line + 1, False
                    continue
                if left and left + _width(part) > limit:
                    left, line, wrapped = 0.0, line + 1, True
                if left or not wrapped or not part.isspace():
                    yield Span(part, left, line, ink, background)
                    left += _width(part)


def _words(view: EpisodeView) -> Iterator[list[TextRun]]:
    """Split the text into words, spaces and line breaks. A word may consist of several tokens."""
    word: list[TextRun] = []
    for text, ink, background in _colored_pieces(view):
        for part in re.findall(r"\n|[^\S\n]+|\S+", text.replace("\t", "    ")):
            if part.isspace():
                yield from [word] if word else []
                yield [(part, ink, background)]
                word = []
            else:
                word.append((part, ink, background))
    yield from [word] if word else []


def _colored_pieces(view: EpisodeView) -> Iterator[TextRun]:
    yield view.prompt, GRAY, None
    for index, piece in enumerate(view.pieces):
        background = None if view.values is None else tint(view.values[index], view.scale)
        indent = len(piece) - len(piece.lstrip())
        if indent < len(piece):  # leading spaces are not colored, unless the token is only spaces
            yield piece[:indent], INK, None
            piece = piece[indent:]
        yield piece, INK, background


def _draw_span(canvas: ImageDraw.ImageDraw, span: Span, top: float) -> None:
    left = MARGIN + span.left
    if span.background is not None:
        right = max(left + _width(span.text) - 1, left)  # some characters have no width
        canvas.rectangle((round(left), top + 2, round(right), top + LINE - 4), fill=span.background)
    canvas.text((left, top + LINE / 2), span.text, fill=span.ink, font=_font(17), anchor="lm")


def _draw_footer(canvas: ImageDraw.ImageDraw, view: EpisodeView, height: int) -> None:
    """Draw the progress bar, the footer items and the color legend."""
    top, middle = height - FOOTER + 10, height - FOOTER / 2 + 6
    right = WIDTH - MARGIN
    canvas.rectangle((MARGIN, top, right, top + 2), fill=FAINT)
    if view.progress > 0:
        canvas.rectangle((MARGIN, top, MARGIN + (right - MARGIN) * min(view.progress, 1.0), top + 2), fill=GRAY)
    for index, item in enumerate(view.footer):
        canvas.text((MARGIN + index * FOOTER_ITEM, middle), item, fill=INK, font=_font(15), anchor="lm")
    if view.values is not None and view.unit:
        _draw_legend(canvas, view, middle)


def _draw_legend(canvas: ImageDraw.ImageDraw, view: EpisodeView, middle: float) -> None:
    """Draw the color scale from −scale, or from 0 if no value is negative, to scale."""
    label, width, right = f"{view.scale:.2g} {view.unit}", 72, WIDTH - MARGIN
    least = -1.0 if min(view.values or (), default=0.0) < 0 else 0.0
    left = right - canvas.textlength(label, font=_font(13)) - 8 - width
    for x in range(width):
        share = least + (1 - least) * x / (width - 1)
        canvas.line((left + x, middle - 6, left + x, middle + 6), fill=tint(share, 1.0))
    canvas.text((left - 8, middle), f"{least * view.scale:.2g}", fill=GRAY, font=_font(13), anchor="rm")
    canvas.text((right, middle), label, fill=GRAY, font=_font(13), anchor="rm")


@lru_cache(maxsize=4096)
def _width(text: str) -> float:
    return _font(17).getlength(text)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib. It covers many alphabets; Pillow's default font lacks even the em dash."""
    import matplotlib  # imported here, since only images need it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    # BASIC, since the other layout engine fails on some strings.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
