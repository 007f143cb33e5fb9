"""What a run reads of files that may be damaged, and what it prints, whatever the terminal."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textenv.training.files import no_room


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects that can be read; none where there is no file.

    A killed run or a full disk may leave a part of a line, a power cut any bytes.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(_parsed, lines) if isinstance(row, dict)]


def is_number(value: object) -> bool:
    """Whether a value of a file that may be damaged is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def never_fail_to_print() -> None:
    r"""Let standard output and error write characters that the terminal's encoding lacks as escapes, such as \u2192."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell_a_full_disk_once() -> None:
    """Let threads that write files, such as TensorBoard's, not print a full disk: their caller raises it again."""
    original = threading.excepthook
    if getattr(original, "tells_once", False):
        return

    def tell(ended: threading.ExceptHookArgs) -> None:
        if no_room(ended.exc_value) is None:
            original(ended)

    tell.tells_once = True  # type: ignore[attr-defined]
    threading.excepthook = tell


@contextmanager
def ending_with_the_reader() -> Iterator[None]:
    """Where whoever reads standard output goes away (`| head`), end the command as a shell does: without a word."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # 0: errors alone, such as that nobody reads
        if not output.poll(0):
            raise  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(128 + signal.SIGPIPE) from None


def as_utf8(argument: str) -> str:
    """A text from the command line. In a locale without UTF-8 Python passes its bytes as surrogates."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
