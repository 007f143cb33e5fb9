"""Ready-made rewards, against hand-computed numbers."""

from __future__ import annotations

from fractions import Fraction

import gymnasium as gym
import numpy as np
import pytest

from tests.support import tiny
from tests.support.episodes import written
from textenv import build_task
from textenv.config import TextGenConfig
from textenv.conformance import check_faces
from textenv.rewards import library
from textenv.rewards.functions import FunctionReward


def scores_of(function, responses, stopped=True, **fields):
    """The scores of a ready-made reward for responses of these texts or token ids."""
    ids = [[*tiny.tokenizer()(r).input_ids, tiny.END] if isinstance(r, str) else r for r in responses]
    batch = written([[65]] * len(ids), ids, tiny.tokenizer(), stopped, fields=fields)
    return FunctionReward(function, "ready-made")(batch).total.tolist()


def test_length_and_unfinished():
    """Length counts tokens, including the end token; unfinished is 1 if the token budget ended the response."""
    assert scores_of(library.length, ["", "abc"]) == [1.0, 4.0]
    assert scores_of(library.unfinished, ["", "abc", "x"], stopped=[True, False, True]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1], 0.0),
        ([1, 1], 0.0),
        ([1, 1, 1], 0.0),  # one trigram
        ([1, 1, 1, 1], 1 / 2),  # 111, 111
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 2, 1, 2, 1, 2], 2 / 4),  # 121 212 121 212
        ([1, 2, 3, 1, 2, 3, 4], 1 / 5),  # 123 231 312 123 234
    ],
)
def test_repetition(ids, share):
    """The share of trigrams that repeat earlier ones."""
    assert scores_of(library.repetition, [ids, [9, 8, 7, 6]]) == pytest.approx([share, 0.0])


def test_exact_match():
    """Case and runs of whitespace are ignored, nothing else is; numeric answers are compared as text."""
    responses = ["The  cat\n", " the cat", "the cat.", "a cat", "7", "8"]
    answers = [*["the cat"] * 4, 7, np.int64(8)]
    assert scores_of(library.exact_match, responses, answer=answers) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


NUMBERS = {
    "": None,
    "none at all": None,
    "so it is 42.": 42,
    "42, I think": 42,
    "first 3 and then 4": 4,
    "-5": -5,
    "x=-5": -5,
    "(-5)": -5,
    "−5": -5,
    "+5": 5,
    "5-3": 3,
    "5 - 3": 3,
    "GPT-4": 4,
    "1,234": 1234,
    "1,234,567.5": Fraction("1234567.5"),
    "1,23": 23,
    "12,3456": 3456,
    "0.5": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "3.14.": Fraction("3.14"),
    "1e3": 1000,
    "1.5e-3": Fraction("0.0015"),
    "1e999999999999": 1,  # not parsed as an exponent, so no huge number is computed
    "3/4": Fraction(3, 4),
    "-3/4 of it": Fraction(-3, 4),
    "1/0": None,
    "50%": 50,
    "$1,200.00": 1200,
    "€5": 5,
    "42km": 42,
    "**42**": 42,
    r"\boxed{42}": 42,
    "#42": 42,
    "B2": None,
    "v1.2.3": None,
    "1.2.3": Fraction("1.2"),
    "9" * 5000: None,  # more digits than Python parses
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20] or "empty")
def test_last_number(text):
    """Signs, thousands separators, decimals, exponents, fractions, and text that is not part of a number."""
    assert library.last_number(text) == NUMBERS[text]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("it is 42", "42", 1),
        ("it is 42", 42, 1),
        ("41 or 42", "41", 0),
        ("1,000", "1000.0", 1),
        ("0.75", "3/4", 1),
        ("50%", "50", 1),
        ("50%", "0.5", 0),
        ("0.3333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("1000000", "1000001", 0),  # integers must be equal
        ("no idea", "0", 0),
        ("#### 18", "so 9 * 2 = 18\n#### 18", 1),
        ("-3", "3", 0),
    ],
)
def test_numeric_match(response, answer, right):
    """The last numbers of response and answer are compared, within a relative 1e-6."""
    assert scores_of(library.numeric_match, [response], answer=[answer]) == [float(right)]


@pytest.mark.parametrize(
    ("function", "answer", "says"),
    [
        (library.numeric_match, "many", "ValueError: the answer 'many' contains no number .*for row 1 .*response 'b'"),
        (library.numeric_match, None, "ValueError: an answer must be a text or a number, got None .*for row 1"),
        (library.exact_match, ["b"], r"ValueError: an answer must be a text or a number, got \['b'\] .*for row 1"),
    ],
)
def test_bad_answers(function, answer, says):
    """An answer that no response could match raises an error that names its row; it never scores 0."""
    with pytest.raises(ValueError, match=f"reward 'ready-made' raised {says}"):
        scores_of(function, ["a", "b"], answer=["1", answer])


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_by_name_in_a_sum(settings):
    """Names and weights are enough, they survive JSON, and every face gives the same scores."""
    penalties = {
        "textenv.rewards.library:length": -0.01,
        "textenv.rewards.library:unfinished": -1,
        "textenv.rewards.library:repetition": -2.0,
    }
    env = gym.make("TextGen-v0", **{**settings, "reward": penalties, "kl_coef": 0, "max_new_tokens": 4})
    env = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    env.reset(seed=0)
    for _ in range(4):
        *_, info = env.step(65)
    assert info["score"] == pytest.approx(-0.04 - 1 - 2.0 * 0.5)
    assert info["score_parts"] == dict(zip(penalties, (4.0, 1.0, 0.5), strict=True))
    check_faces(build_task(TextGenConfig(**{**settings, "reward": penalties, "kl_coef": 0})), rows=2)
