"""Files that survive: UTF-8 whatever the system's locale, replaced as a whole, by one process at a time.

A full disk is named as such.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file larger than the process may write

LOCK = ".lock"  # a file in a folder that a process holds
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


def no_room(error: BaseException | None) -> OSError | None:
    """The error of a full disk behind an error, if there is one."""
    short, known = False, False  # whether torch.save wrote less than it gave, and whether an error says why
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        for number in NO_ROOM:
            if f"(os error {number})" in str(error):  # from the Rust code of safetensors and tokenizers
                return OSError(number, os.strerror(number))
        known = known or isinstance(error, OSError | KeyboardInterrupt)
        short = short or ("inline_container.cc" in str(error) and "unexpected pos" in str(error))
        error = error.__cause__ or error.__context__
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if short and not known else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    Raises ValueError while another process holds it, and for a folder that may not be written.
    """
    try:
        held = FileLock(folder / LOCK).acquire(timeout=1)  # seconds: who only looks holds it for a moment
    except Timeout as error:
        raise _taken(folder) from error
    except OSError as error:
        raise ValueError(
            f"the folder {str(folder)!r} cannot be locked ({error}); make it writable, or resume a copy of it."
        ) from error
    with held:
        yield


def check_unlocked(folder: Path) -> None:
    """Raise ValueError while another process holds the folder. Creates nothing."""
    if is_locked(folder):
        raise _taken(folder)


def _taken(folder: Path) -> ValueError:
    return ValueError(
        f"another process is training in {str(folder)!r}; wait until it ends, or stop it, and then --resume."
    )


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder."""
    if not os.path.isfile(folder / LOCK):
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # of a folder that may only be read
        return False
