"""Prompts of the embedded task: their wording, and the training and held-out sets."""

from __future__ import annotations

import random
import re
from functools import cache
from typing import NamedTuple

from textenv.reviews.grammar.products import PRODUCTS

TRAIN, HELD_OUT = 4096, 512  # distinct prompts of each set
_SEED = 20
_ASPECT_COUNTS, _COUNT_WEIGHTS = (1, 2, 3), (0.10, 0.45, 0.45)
_PROMPT = re.compile(r"Review of the ([a-z ]+) \(([a-z, ]+)\):")


class Request(NamedTuple):
    """What a prompt asks for."""

    product: str
    aspects: tuple[str, ...]


def prompt_text(request: Request) -> str:
    """The wording of a request."""
    return f"Review of the {request.product} ({', '.join(request.aspects)}):"


def parse_prompt(prompt: str) -> Request:
    """The request behind a prompt; the gold rater and the grammar read prompts only through this."""
    match = _PROMPT.fullmatch(prompt.strip())
    if not match or match[1] not in PRODUCTS:
        raise ValueError(
            f"not a prompt of the reviews task: {prompt!r}. Expected the form "
            "'Review of the kettle (noise, price):' with a product of textenv.reviews.grammar.products."
        )
    return Request(match[1], tuple(match[2].split(", ")))


def train_prompts() -> list[str]:
    """The 4096 distinct prompts that every model of the task was trained on."""
    return list(_all_prompts()[:TRAIN])


def held_out_prompts() -> list[str]:
    """The 512 distinct prompts that no model of the task has seen."""
    return list(_all_prompts()[TRAIN:])


@cache
def _all_prompts() -> tuple[str, ...]:
    rng = random.Random(_SEED)
    names = list(PRODUCTS)
    chosen: dict[str, None] = {}
    while len(chosen) < TRAIN + HELD_OUT:
        product = PRODUCTS[rng.choice(names)]
        count = rng.choices(_ASPECT_COUNTS, _COUNT_WEIGHTS)[0]
        aspects = rng.sample(product.aspects, count)
        chosen[prompt_text(Request(product.name, tuple(aspects)))] = None
    prompts = list(chosen)
    rng.shuffle(prompts)  # late draws hold fewer short prompts; both sets get their share
    return tuple(prompts)
