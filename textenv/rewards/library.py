"""Ready-made rewards, by name: `reward={"textenv.rewards.library:exact_match": 1.0}`.

`length`, `unfinished` and `repetition` count what is unwanted, from 0 up: give them negative weights.
`exact_match` and `numeric_match` compare the response with the prompt field `answer`.
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

TOLERANCE = 1e-6  # relative; applies unless both numbers are integers

MAX_NUMBER_CHARACTERS = 400  # Python refuses to parse integers of several thousand digits

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}])[-+−] | (?<![\w.]) )  # neither the minus of "5-3" nor a digit inside a word or a version
    (?P<size> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )
    (?P<exponent> (?:[eE][-+]?[0-9]{1,3}(?![0-9]))? )
    (?: / (?P<denominator>[0-9]+) )?
    """,
    re.VERBOSE,
)


@per_batch
def length(batch: ResponseBatch) -> Tensor:
    """The number of generated tokens in the response, including the stop token. Returns [B]."""
    return batch.state.generated_length


@per_batch
def unfinished(batch: ResponseBatch) -> Tensor:
    """1 if the token budget cut the response off, 0 if it ended with a stop token. Returns [B]."""
    return (~batch.stopped).float()


@per_batch
def repetition(batch: ResponseBatch) -> Tensor:
    """The share of token trigrams that repeat earlier ones: 1 − distinct trigrams / all trigrams. Returns [B].

    seq-rep-3 of Welleck et al. 2020 ("Neural text generation with unlikelihood training"). 0 below three tokens.
    """
    return torch.tensor([_repeated_trigrams(ids) for ids in batch.response_ids])


@per_response()
def exact_match(prompt: str, response: str, answer: Any) -> float:
    """1 if response and answer are equal up to case and runs of whitespace, else 0."""
    return float(_canonical(response) == _canonical(_as_text(answer)))


@per_response()
def numeric_match(prompt: str, response: str, answer: Any) -> float:
    """1 if the last number in the response equals the last number in the answer, else 0.

    Numbers may have signs (`-`, `+`, `−`), thousands separators (`1,234.5`), decimals (`.5`), exponents (`1e3`) and
    fractions (`3/4`). Percent signs, currencies and units are ignored: `50%` is 50. A comma is never a decimal point.
    Integers must be equal, other numbers within a relative 1e-6. A response without a number gets 0.
    """
    expected = last_number(_as_text(answer))
    if expected is None:
        raise ValueError(f"the answer {answer!r} contains no number")
    got = last_number(response)
    if got is None:
        return 0.0
    integers = got.denominator == expected.denominator == 1
    return float(got == expected or (not integers and abs(got - expected) <= TOLERANCE * max(abs(got), abs(expected))))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as `numeric_match` parses it; None if there is no number."""
    numbers = list(NUMBER.finditer(text))
    if not numbers or len(numbers[-1][0]) > MAX_NUMBER_CHARACTERS:
        return None
    last = numbers[-1]
    denominator = int(last["denominator"] or 1)
    value = Fraction(last["sign"].replace("−", "-") + last["size"].replace(",", "") + last["exponent"])
    return value / denominator if denominator else None


def _repeated_trigrams(ids: list[int]) -> float:
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _canonical(text: str) -> str:
    return " ".join(text.split()).casefold()


def _as_text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | Real):
        raise ValueError(f"an answer must be a text or a number, got {answer!r}")
    return str(answer)
