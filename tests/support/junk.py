"""Bad inputs of every kind, and what may come of them."""

from __future__ import annotations

import dis
import math
from pathlib import Path
from types import TracebackType

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import agents
import textenv
from textenv import shared

OURS = [Path(str(package.__file__)).parent for package in (agents, textenv)]


def many(count: int) -> settings:
    """So many examples, the same ones at every run."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def assert_refused(error: BaseException, given: object) -> None:
    """A sentence in a ValueError or TypeError, by a `raise` of our own: no other error, and none from elsewhere."""
    trace = error.__traceback__
    while isinstance(trace, TracebackType) and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    code = trace.tb_frame.f_code
    ours = any(folder in Path(code.co_filename).parents for folder in OURS)
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    where = f"{code.co_filename}:{trace.tb_lineno}"
    assert isinstance(error, ValueError | TypeError) and ours and raised, f"{given!r}: {error!r} from {where}"
    assert len(str(error).split()) >= 4, f"{given!r}: {error!r} is no sentence"


class Odd:
    """An object that nobody expects."""


# Never a number so large that an honest environment of that size would fill the memory.
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([-(10**9), 10**6, math.nan, math.inf, -math.inf, 1e308, -(10**400)]),
    st.floats(-4, 4),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "uniform", "a:b", ":", "a:", ":b", "..a:b", "os:getcwd", "json:loads", "os.path:sep"]),
    st.sampled_from(
        ["top_k:3", "top_p:2", "words:", "regex:(", "missing.jsonl", "./nowhere", "/", "~", "\ud800", "a\0b"]
    ),
    st.sampled_from(["evaluate:", "evaluate:a:", "evaluate:::", "none", "fixed", "running", "special", "cpu", "meta"]),
    st.sampled_from(["cuda:77", "x" * 5000]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    WORDS,
    st.builds(Odd),
    st.sampled_from(
        [np.float64(2.5), np.float32(math.nan), np.int64(3), np.bool_(True), np.str_("a"), b"x", Path("x")]
    ),
)
JUNK = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.tuples(SCALARS),
    st.dictionaries(st.one_of(WORDS, NUMBERS, st.none()), SCALARS, max_size=2),
    st.lists(
        st.dictionaries(st.sampled_from(["prompt", "answer", "weight", "role", "content", ""]), SCALARS), max_size=2
    ),
    st.lists(st.lists(st.fixed_dictionaries({"role": WORDS, "content": WORDS}), max_size=2), min_size=1, max_size=2),
    st.sampled_from(
        [len, print, Odd, np.arange(3), {1, 2}, shared(3), shared(Odd()), shared(None), range(3), iter("a")]
    ),
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with a part cut, doubled, overwritten or filled in."""
    fill = st.one_of(
        st.binary(max_size=6),
        st.sampled_from(
            [b"null", b"1e999", b"NaN", b"-1", b"[]", b"{}", b'"', b"\\", b"\xef\xbb\xbf", b"\xff", b"9" * 400]
        ),
        st.sampled_from([b"[" * 5000, b"\\ud800", b"true", b"0.5", b'"x"', b"\0", b"\n", b"99999999999999999999"]),
    )
    place = st.integers(0, len(content))
    return st.tuples(place, st.integers(0, 40), fill).map(
        lambda cut: content[: cut[0]] + cut[2] + content[cut[0] + cut[1] :]
    ) | place.map(lambda end: content[:end])


def replaced_values(value: object) -> st.SearchStrategy[object]:
    """A JSON value with one of its parts, at any depth, removed or replaced."""
    others = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 400),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=4),
        st.just([]),
        st.just({}),
        st.lists(st.integers(-2, 400), max_size=3),
    )
    if isinstance(value, dict) and value:
        return others | st.sampled_from(sorted(value)).flatmap(
            lambda name: (
                st.just({key: item for key, item in value.items() if key != name})
                | replaced_values(value[name]).map(lambda item: {**value, name: item})
            )
        )
    if isinstance(value, list) and value:
        return others | st.integers(0, len(value) - 1).flatmap(
            lambda at: replaced_values(value[at]).map(lambda item: [*value[:at], item, *value[at + 1 :]])
        )
    return others
