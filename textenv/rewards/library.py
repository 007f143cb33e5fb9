"""Ready-made rewards, by name: `reward={"textenv.rewards.library:exact_match": 1.0}`.

Penalties (`length`, `unfinished`, `repetition`) are what is to be counted, from 0 up: give them negative weights.
Verifiable answers (`exact_match`, `numeric_match`) compare the response with the prompts' field `answer`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from textenv.rewards.base import ResponseBatch
from textenv.rewards.functions import per_batch, per_response

TOLERANCE = 1e-6  # relative, between numbers that are not both whole

LONGEST = 400  # characters of a number; Python refuses to read integers of some thousand digits

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}])[-+−] | (?<![\w.]) )  # not the minus of "5-3"; nor a digit inside a word or a version
    (?P<size> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )
    (?P<exponent> (?:[eE][-+]?[0-9]{1,3}(?![0-9]))? )
    (?: / (?P<denominator>[0-9]+) )?
    """,
    re.VERBOSE,
)


@per_batch
def length(episodes: ResponseBatch) -> Tensor:
    """Generated tokens of the response, the stop token included. [B]."""
    return episodes.state.generated_length


@per_batch
def unfinished(episodes: ResponseBatch) -> Tensor:
    """1 for a response that the budget cut off, 0 for one that ended with a stop token. [B]."""
    return (~episodes.stopped).float()


@per_batch
def repetition(episodes: ResponseBatch) -> Tensor:
    """The share of token trigrams that occurred before in the response: 1 − different ones / all. [B].

    seq-rep-3 of Welleck et al. 2020 ("Neural text generation with unlikelihood training"); 0 below three tokens.
    """
    return torch.tensor([_repeated_trigrams(ids) for ids in episodes.response_ids])


@per_response()
def exact_match(prompt: str, response: str, answer: Any) -> float:
    """1 where response and answer are the same words: case and runs of white space do not count."""
    return float(_plain(response) == _plain(_as_text(answer)))


@per_response()
def numeric_match(prompt: str, response: str, answer: Any) -> float:
    """1 where the last number in the response equals the (last) number in the answer.

    Read as numbers: signs (`-`, `+`, `−`), thousands in commas (`1,234.5`), decimals (`.5`), exponents (`1e3`) and
    fractions (`3/4`). A percent sign, a currency or a unit changes nothing: `50%` is 50. A comma is never a decimal
    point. Whole numbers must be equal, others to a millionth of their size. Without a number a response gets 0.
    """
    wanted = last_number(_as_text(answer))
    if wanted is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    got = last_number(response)
    if got is None:
        return 0.0
    whole = got.denominator == wanted.denominator == 1
    return float(got == wanted or (not whole and abs(got - wanted) <= TOLERANCE * max(abs(got), abs(wanted))))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as `numeric_match` reads it; None where there is none."""
    numbers = list(NUMBER.finditer(text))
    if not numbers or len(numbers[-1][0]) > LONGEST:
        return None
    found = numbers[-1]
    denominator = int(found["denominator"] or 1)
    value = Fraction(found["sign"].replace("−", "-") + found["size"].replace(",", "") + found["exponent"])
    return value / denominator if denominator else None


def _repeated_trigrams(ids: list[int]) -> float:
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _as_text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | Real):
        raise ValueError(f"an answer must be a text or a number, got {answer!r}")
    return str(answer)
