"""Tells sentences from surprises, and both from a request to stop.

An error that our own code raises names its remedy, any other needs its traceback.
"""

from __future__ import annotations

import dis
from pathlib import Path

import textenv

OURS = (Path(__file__).parents[1], Path(str(textenv.__file__)).parent)


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` in a file of the two packages raised it.

    Python's own errors come from other instructions, even where the line is ours.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raises = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raises and any(folder in Path(code.co_filename).parents for folder in OURS)


def stop_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM that an error comes from, if there is one.

    A library may raise an error of its own while a stop passes through it: torch.save does, where it closes its file.
    """
    ahead, seen = [error], set()
    while ahead:
        error = ahead.pop()
        if isinstance(error, KeyboardInterrupt):
            return error
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            ahead += [error.__cause__, error.__context__]
    return None
