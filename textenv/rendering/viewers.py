"""What a render mode shows while an environment runs: text or a picture of each row, or live typing.

A viewer is told of every reset and step of its environment, and there is none where nothing is to be shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from torch import Tensor

from textenv.dynamics import Transition
from textenv.rendering import picture
from textenv.rendering.text import PROMPT, EpisodeView, TextStreamer, color, paint, printable, shade
from textenv.state import TextState
from textenv.task import Task

FPS = 10  # tokens a second, in videos and in a terminal
# Nats from which a token counts as a full surprise to the reference: a probability below 1 in 400.
SURPRISE = 6.0
UNIT = "nats of surprise"


class Viewer(Protocol):
    """What the faces of the environment ask of a render mode."""

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """New episodes begin in these rows."""
        ...

    def record(self, transition: Transition, active: Tensor) -> None:
        """A token was written in the active rows; active: bool [B]."""
        ...

    def frames(self) -> tuple[Any, ...]:
        """What each row looks like now; nothing where it is shown by itself."""
        ...

    def close(self) -> None:
        """Nothing more will be shown."""
        ...


class ImageViewer:
    """The page of every row, drawn when somebody asks for it."""

    def __init__(self, task: Task, rows: int, draw: Callable[[EpisodeView], Any]) -> None:
        self.task, self.draw = task, draw
        self.stories = [ResponseRecord(task, []) for _ in range(rows)]

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """New episodes begin in these rows."""
        for row in rows:
            self.stories[row] = ResponseRecord(self.task, _prompt_ids(state, row))

    def record(self, transition: Transition, active: Tensor) -> None:
        """A token was written in the active rows."""
        for row in active.nonzero()[:, 0].tolist():
            self.stories[row].add(transition, row)

    def frames(self) -> tuple[Any, ...]:
        """What each row looks like now."""
        return tuple(self.draw(story.page()) for story in self.stories)

    def close(self) -> None:
        """Nothing is open."""


class TextViewer:
    """Types one row into the terminal as its tokens come: prompt gray, tokens by their surprise, score last.

    Colors and the pace of `FPS` tokens a second are for terminals; a file or a pipe gets plain text at once.
    """

    def __init__(self, task: Task, rows: int) -> None:
        self.task, self.story, self.open = task, ResponseRecord(task, []), False

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """Types the prompt on a line of its own."""
        self.close()
        self.story, self.open = ResponseRecord(self.task, _prompt_ids(state, 0)), True
        self._type(self.story.prompt, PROMPT)

    def record(self, transition: Transition, active: Tensor) -> None:
        """Types the token; after the last one the score."""
        self.story.add(transition, 0)
        value = self.story.values[-1]
        self._type(self.story.pieces[-1], None if self.task.reference is None else shade(value, SURPRISE))
        if _is_terminal(sys.stdout):
            time.sleep(1 / FPS)
        if self.story.ending:
            self._type(f"  [{self.story.ending}]", PROMPT)
            self.close()

    def frames(self) -> tuple[Any, ...]:
        """Nothing: all is typed already."""
        return (None,)

    def close(self) -> None:
        """Ends the line that is being typed."""
        if self.open:
            self._type("\n", None)
        self.open = False

    def _type(self, text: str, code: int | None) -> None:
        if sys.stdout is None:  # a program without a console has none
            return
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # what the terminal has no letter for is a "?"
        sys.stdout.write(color(text, code) if _is_terminal(sys.stdout) else text)
        sys.stdout.flush()


class ResponseRecord:
    """One row's episode so far, in the words and numbers that are shown of it."""

    def __init__(self, task: Task, prompt_ids: Sequence[int]) -> None:
        self.task, self.typewriter = task, TextStreamer(task.tokenizer, prompt_ids)
        self.prompt = printable(self.typewriter.prompt)
        self.pieces: list[str] = []
        self.values: list[float] = []  # surprise of the reference, −log π_ref, nats
        self.paid, self.ending = 0.0, ""

    def add(self, transition: Transition, row: int) -> None:
        """One token more."""
        state = transition.state
        token = int(state.input_ids[row, state.prompt_width + int(state.length[row]) - 1])
        self.pieces.append(self.typewriter.type(token))
        self.values.append(-float(transition.reference_log_prob[row]))
        self.paid += float(transition.reward[row])
        if bool(transition.terminated[row]):
            self.pieces[-1] += self.typewriter.rest()
            self.ending = f"score {float(transition.score[row]):+.2f}, {transition.finish_reason(row)}"

    def page(self) -> EpisodeView:
        """The episode so far as it is shown."""
        budget, length = self.task.config.max_new_tokens, len(self.pieces)
        parts = [f"token {length} of {budget}", f"reward {self.paid:+.2f}", *([self.ending] if self.ending else [])]
        return EpisodeView(
            prompt=self.prompt,
            pieces=tuple(self.pieces),
            values=None if self.task.reference is None else tuple(self.values),
            scale=SURPRISE,
            unit=UNIT,
            footer=parts,
            progress=length / budget,
        )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _text_viewer(task: Task, rows: int) -> Viewer:
    return ImageViewer(task, rows, paint)


def _picture_viewer(task: Task, rows: int) -> Viewer:
    lines = picture.lines_for(task.width)
    return ImageViewer(task, rows, lambda page: picture.draw(page, lines))


def _prompt_ids(state: TextState, row: int) -> list[int]:
    width = state.prompt_width
    return state.input_ids[row, :width][state.attention_mask[row, :width]].tolist()


VIEWERS: dict[str, Callable[[Task, int], Viewer]] = {
    "ansi": _text_viewer,
    "human": TextViewer,
    "rgb_array": _picture_viewer,
}


def check_render_mode(mode: Any, modes: Sequence[str], remedy: str = "") -> None:
    """Raises ValueError for what is no render mode of an environment."""
    if mode is not None and mode not in modes:
        raise ValueError(f"render_mode must be None or one of {list(modes)}, got {mode!r}{remedy}.")


def make_viewer(mode: str | None, task: Task, rows: int) -> Viewer | None:
    """The viewer of a render mode; None shows nothing, and costs nothing."""
    return None if mode is None else VIEWERS[mode](task, rows)
