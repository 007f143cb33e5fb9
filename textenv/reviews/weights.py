"""The folders with the weights of the embedded task."""

from __future__ import annotations

from pathlib import Path

SUPERVISED = Path(__file__).parent / "supervised"  # causal language model and tokenizer
REWARD_MODEL = Path(__file__).parent / "reward_model"  # sequence classifier with one label, and tokenizer
