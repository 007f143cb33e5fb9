"""A page as a picture: every frame of an environment has the same size, so that frames make a video.

Tokens stand on the color of their number, from blue (below zero) over the paper's own to red (above).
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
BLUE, RED = (104, 164, 222), (240, 128, 108)  # behind ink, at their strongest
WIDTH, MARGIN, LINE, FOOTER = 768, 28, 30, 52  # pixels
BLOCK = 16  # video codecs want sides that are multiples of it
FACT = 160  # pixels from one fact of the footer to the next, so that they stand still in a video
FEWEST, MOST = 4, 24  # lines of text
LETTERS_A_TOKEN, LETTERS_A_LINE = 5, 70  # rough, to choose a height; what does not fit scrolls


@dataclass(frozen=True)
class Mark:
    """A run of letters in its place."""

    text: str
    left: float  # pixels from the left margin
    line: int
    ink: Color
    back: Color | None


def lines_for(tokens: int) -> int:
    """Lines of text that a picture should have room for, if its texts have up to so many tokens."""
    return min(max(math.ceil(tokens * LETTERS_A_TOKEN / LETTERS_A_LINE), FEWEST), MOST)


def draw(page: EpisodeView, lines: int) -> NDArray[np.uint8]:
    """A page as a picture, uint8 [H, W, 3]. H depends on `lines` alone; of longer texts the last lines show."""
    height = BLOCK * math.ceil((MARGIN + lines * LINE + FOOTER) / BLOCK)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    canvas = ImageDraw.Draw(image)
    marks = list(_lay_out(page))
    hidden = max(marks[-1].line + 1 - lines, 0) if marks else 0
    for mark in marks:
        if mark.line >= hidden:
            _draw_mark(canvas, mark, MARGIN + (mark.line - hidden) * LINE)
    _draw_footer(canvas, page, height)
    return np.array(image)


def tint(value: float, scale: float) -> Color:
    """The color behind a token: the paper's own at zero, full blue or red from `scale` on."""
    strength = min(abs(value) / scale, 1.0)
    return _mix(PAPER, BLUE if value < 0 else RED, strength)


def _mix(start: Color, end: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _lay_out(page: EpisodeView) -> Iterator[Mark]:
    """Letters in lines, broken between words where a line has a space, else wherever it is full."""
    left, line, limit = 0.0, 0, WIDTH - 2 * MARGIN
    broken = False  # whether this line began because the last one was full: then no space begins it
    for word in _words(page):
        width = sum(_width(text) for text, _, _ in word)
        if left and left + width > limit:
            left, line, broken = 0.0, line + 1, True
        for text, ink, back in word:
            for part in [text] if width <= limit else text:
                if part == "\n":
                    left, line, broken = 0.0, line + 1, False
                    continue
                if left and left + _width(part) > limit:
                    left, line, broken = 0.0, line + 1, True
                if left or not broken or not part.isspace():
                    yield Mark(part, left, line, ink, back)
                    left += _width(part)


def _words(page: EpisodeView) -> Iterator[list[tuple[str, Color, Color | None]]]:
    """Runs without a space, and spaces and line ends by themselves; a word may be of several tokens."""
    word: list[tuple[str, Color, Color | None]] = []
    for text, ink, back in _inked(page):
        for part in re.findall(r"\n|[^\S\n]+|\S+", text.replace("\t", "    ")):
            if part.isspace():
                yield from [word] if word else []
                yield [(part, ink, back)]
                word = []
            else:
                word.append((part, ink, back))
    yield from [word] if word else []


def _inked(page: EpisodeView) -> Iterator[tuple[str, Color, Color | None]]:
    yield page.prompt, GRAY, None
    for index, piece in enumerate(page.pieces):
        back = None if page.values is None else tint(page.values[index], page.scale)
        blank = len(piece) - len(piece.lstrip())
        if blank < len(piece):  # color begins with the letters; only a token of nothing but space shows it there
            yield piece[:blank], INK, None
            piece = piece[blank:]
        yield piece, INK, back


def _draw_mark(canvas: ImageDraw.ImageDraw, mark: Mark, top: float) -> None:
    left = MARGIN + mark.left
    if mark.back is not None:
        right = max(left + _width(mark.text) - 1, left)  # some letters have no width
        canvas.rectangle((round(left), top + 2, round(right), top + LINE - 4), fill=mark.back)
    canvas.text((left, top + LINE / 2), mark.text, fill=mark.ink, font=_font(17), anchor="lm")


def _draw_footer(canvas: ImageDraw.ImageDraw, page: EpisodeView, height: int) -> None:
    """How far the response is, what was paid for it, and what the colors mean."""
    top, middle = height - FOOTER + 10, height - FOOTER / 2 + 6
    right = WIDTH - MARGIN
    canvas.rectangle((MARGIN, top, right, top + 2), fill=FAINT)
    if page.progress > 0:
        canvas.rectangle((MARGIN, top, MARGIN + (right - MARGIN) * min(page.progress, 1.0), top + 2), fill=GRAY)
    for index, fact in enumerate(page.footer):
        canvas.text((MARGIN + index * FACT, middle), fact, fill=INK, font=_font(15), anchor="lm")
    if page.values is not None and page.unit:
        _draw_legend(canvas, page, middle)


def _draw_legend(canvas: ImageDraw.ImageDraw, page: EpisodeView, middle: float) -> None:
    """The colors from the least number to the greatest; where none is below zero, from zero."""
    label, width, right = f"{page.scale:.2g} {page.unit}", 72, WIDTH - MARGIN
    least = -1.0 if min(page.values or (), default=0.0) < 0 else 0.0
    left = right - canvas.textlength(label, font=_font(13)) - 8 - width
    for x in range(width):
        share = least + (1 - least) * x / (width - 1)
        canvas.line((left + x, middle - 6, left + x, middle + 6), fill=tint(share, 1.0))
    canvas.text((left - 8, middle), f"{least * page.scale:.2g}", fill=GRAY, font=_font(13), anchor="rm")
    canvas.text((right, middle), label, fill=GRAY, font=_font(13), anchor="rm")


@lru_cache(maxsize=4096)
def _width(text: str) -> float:
    return _font(17).getlength(text)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: many alphabets, where Pillow's own font lacks even a long dash."""
    import matplotlib  # here, since it is needed by nobody who draws no pictures

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)  # the other one refuses some strings
