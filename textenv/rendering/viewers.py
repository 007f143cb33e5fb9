"""The render modes: text or an image of each row, or live text in the terminal.

An environment passes every reset and step to its viewer. Without a render mode there is no viewer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from torch import Tensor

from textenv.dynamics import Transition
from textenv.rendering import picture
from textenv.rendering.text import PROMPT_COLOR, EpisodeView, TextStreamer, color, paint, printable, shade
from textenv.state import TextState
from textenv.task import Task

FPS = 10  # tokens per second, in videos and in a terminal
# Surprise −log π_ref, in nats, at which colors reach full strength: a probability below 1 in 400.
MAX_SURPRISE = 6.0
UNIT = "nats of surprise"


class Viewer(Protocol):
    """The interface between an environment and its render mode."""

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """Start new episodes in these rows."""
        ...

    def record(self, transition: Transition, active: Tensor) -> None:
        """Record the step of the active rows; active: bool [B]."""
        ...

    def frames(self) -> tuple[Any, ...]:
        """The current frame of each row; None for a viewer that displays by itself."""
        ...

    def close(self) -> None:
        """Release resources and finish the output."""
        ...


class ImageViewer:
    """Records every row, and draws it on request: as an image, or as text."""

    def __init__(self, task: Task, rows: int, draw: Callable[[EpisodeView], Any]) -> None:
        self.task, self.draw = task, draw
        self.records = [ResponseRecord(task, []) for _ in range(rows)]

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """Start new episodes in these rows."""
        for row in rows:
            self.records[row] = ResponseRecord(self.task, _prompt_ids(state, row))

    def record(self, transition: Transition, active: Tensor) -> None:
        """Record the step of the active rows."""
        for row in active.nonzero()[:, 0].tolist():
            self.records[row].add(transition, row)

    def frames(self) -> tuple[Any, ...]:
        """The current frame of each row."""
        return tuple(self.draw(record.view()) for record in self.records)

    def close(self) -> None:
        """Do nothing."""


class TextViewer:
    """Writes row 0 to standard output as its tokens arrive: prompt in gray, tokens by surprise, then the score.

    A terminal gets colors and `FPS` tokens per second; a file or a pipe gets plain text without delay.
    """

    def __init__(self, task: Task, rows: int) -> None:
        self.task, self.episode, self.line_open = task, ResponseRecord(task, []), False

    def restart(self, rows: Sequence[int], state: TextState) -> None:
        """Write the prompt on a new line."""
        self.close()
        self.episode, self.line_open = ResponseRecord(self.task, _prompt_ids(state, 0)), True
        self._write(self.episode.prompt, PROMPT_COLOR)

    def record(self, transition: Transition, active: Tensor) -> None:
        """Write the token, and the score after the last token."""
        self.episode.add(transition, 0)
        surprise = self.episode.values[-1]
        self._write(self.episode.pieces[-1], None if self.task.reference is None else shade(surprise, MAX_SURPRISE))
        if _is_terminal(sys.stdout):
            time.sleep(1 / FPS)
        if self.episode.ending:
            self._write(f"  [{self.episode.ending}]", PROMPT_COLOR)
            self.close()

    def frames(self) -> tuple[Any, ...]:
        """None, since the text is already written."""
        return (None,)

    def close(self) -> None:
        """End the current line."""
        if self.line_open:
            self._write("\n", None)
        self.line_open = False

    def _write(self, text: str, code: int | None) -> None:
        if sys.stdout is None:  # in a program without a console
            return
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # characters outside the encoding become "?"
        sys.stdout.write(color(text, code) if _is_terminal(sys.stdout) else text)
        sys.stdout.flush()


class ResponseRecord:
    """The current episode of one row, as text and numbers for display."""

    def __init__(self, task: Task, prompt_ids: Sequence[int]) -> None:
        self.task, self.streamer = task, TextStreamer(task.tokenizer, prompt_ids)
        self.prompt = printable(self.streamer.prompt)
        self.pieces: list[str] = []
        self.values: list[float] = []  # surprise of the reference, −log π_ref, nats
        self.paid, self.ending = 0.0, ""

    def add(self, transition: Transition, row: int) -> None:
        """Add the token of a step."""
        state = transition.state
        token = int(state.input_ids[row, state.prompt_width + int(state.length[row]) - 1])
        self.pieces.append(self.streamer.add(token))
        self.values.append(-float(transition.reference_log_prob[row]))
        self.paid += float(transition.reward[row])
        if bool(transition.terminated[row]):
            self.pieces[-1] += self.streamer.flush()
            self.ending = f"score {float(transition.score[row]):+.2f}, {transition.finish_reason(row)}"

    def view(self) -> EpisodeView:
        """The view of the episode so far."""
        budget, length = self.task.config.max_new_tokens, len(self.pieces)
        footer = [f"token {length} of {budget}", f"reward {self.paid:+.2f}", *([self.ending] if self.ending else [])]
        return EpisodeView(
            prompt=self.prompt,
            pieces=tuple(self.pieces),
            values=None if self.task.reference is None else tuple(self.values),
            scale=MAX_SURPRISE,
            unit=UNIT,
            footer=footer,
            progress=length / budget,
        )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _text_viewer(task: Task, rows: int) -> Viewer:
    return ImageViewer(task, rows, paint)


def _image_viewer(task: Task, rows: int) -> Viewer:
    lines = picture.lines_for(task.width)
    return ImageViewer(task, rows, lambda view: picture.draw(view, lines))


def _prompt_ids(state: TextState, row: int) -> list[int]:
    width = state.prompt_width
    return state.input_ids[row, :width][state.attention_mask[row, :width]].tolist()


VIEWERS: dict[str, Callable[[Task, int], Viewer]] = {
    "ansi": _text_viewer,
    "human": TextViewer,
    "rgb_array": _image_viewer,
}


def check_render_mode(mode: Any, modes: Sequence[str], remedy: str = "") -> None:
    """Raise ValueError unless `mode` is None or one of `modes`."""
    if mode is not None and mode not in modes:
        raise ValueError(f"render_mode must be None or one of {list(modes)}, got {mode!r}{remedy}.")


def make_viewer(mode: str | None, task: Task, rows: int) -> Viewer | None:
    """The viewer of a render mode; None without one."""
    return None if mode is None else VIEWERS[mode](task, rows)
