"""The embedded task: product reviews, with everything that RLHF needs and something true to measure against.

Owns the public names of the task. Importing it loads no model and no deep-learning library.
"""

from __future__ import annotations

from pathlib import Path

from textenv.reviews.gold import gold
from textenv.reviews.grammar import sample_review
from textenv.reviews.parser import parses
from textenv.reviews.prompts import held_out_prompts, train_prompts

SUPERVISED = Path(__file__).parent / "supervised"  # causal language model and tokenizer
REWARD_MODEL = Path(__file__).parent / "reward_model"  # sequence classifier with one label, and tokenizer

__all__ = [
    "REWARD_MODEL",
    "SUPERVISED",
    "gold",
    "held_out_prompts",
    "parses",
    "sample_review",
    "train_prompts",
]
