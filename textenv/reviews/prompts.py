"""Prompts of the embedded task: their wording, and the disjoint training and held-out sets."""

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
    """The content of a prompt: a product, and the aspects that the review should cover."""

    product: str
    aspects: tuple[str, ...]


def prompt_text(request: Request) -> str:
    """The prompt of a request."""
    return f"Review of the {request.product} ({', '.join(request.aspects)}):"


def parse_prompt(prompt: str) -> Request:
    """The request of a prompt, the inverse of `prompt_text`. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt.strip())
    if not match or match[1] not in PRODUCTS:
        raise ValueError(
            f"not a prompt of the reviews task: {prompt!r}. Expected the form "
            "'Review of the kettle (noise, price):' with a product of textenv.reviews.grammar.products."
        )
    return Request(match[1], tuple(match[2].split(", ")))


def train_prompts() -> list[str]:
    """The 4096 distinct prompts that both models of the task were trained on."""
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
    rng.shuffle(prompts)  # late draws contain fewer short prompts; shuffling gives both sets their share
    return tuple(prompts)
