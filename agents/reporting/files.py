"""Files of a run: UTF-8 whatever the system's locale, replaced as a whole, and a full disk named as such."""

from __future__ import annotations

import errno
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
from typing import IO, Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file larger than the process may write

UNFINISHED = ".new"  # ends the name of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends; if it fails, `path` stays as it was.

    Whenever the process is killed, `path` is the old file or the new one, never a part. Raises OSError where the disk
    is full, also for writers that report something else.
    """
    new = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name without its content
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if (reason := no_room(error)) is not None and reason is not error:
            raise reason from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove the parts of files that a killed process has left in a folder that nobody else writes to."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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


def no_room(error: BaseException | None) -> OSError | None:
    """The error of a full disk behind an error, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        for number in NO_ROOM:
            if f"(os error {number})" in str(error):  # from the Rust code of safetensors and tokenizers
                return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
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
