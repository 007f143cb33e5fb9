"""Sources of prompts, tokenised once, and a seeded sampler whose state can be saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textenv.loading import load_function, unwrap


@dataclass(frozen=True)
class Prompts:
    """N prompts as texts and as left-padded tokens."""

    texts: tuple[str, ...]
    input_ids: Tensor  # int64 [N, P]
    attention_mask: Tensor  # bool [N, P]

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on a device."""
        return Prompts(self.texts, self.input_ids.to(device), self.attention_mask.to(device))

    def select(self, indices: Sequence[int]) -> Prompts:
        """The prompts of these indices alone."""
        chosen = torch.as_tensor(list(indices), dtype=torch.long, device=self.input_ids.device)
        return Prompts(
            tuple(self.texts[index] for index in indices), self.input_ids[chosen], self.attention_mask[chosen]
        )


def read_prompts(source: Any) -> list[str]:
    """Texts from a list (or a `datasets` column), a `.jsonl` path, or `"module:function"`."""
    source = unwrap(source)
    if isinstance(source, str | Path):
        name = str(source)
        if name.endswith(".jsonl"):
            texts = _read_jsonl(Path(name))
        elif ":" in name:
            texts = _call(load_function(name), name)
        else:
            raise ValueError(
                f"prompts must be a list of texts, a path that ends in .jsonl, or 'module:function', got {name!r}."
            )
    elif callable(source):
        texts = _call(source, getattr(source, "__name__", repr(source)))
    elif isinstance(source, Sequence):
        texts = list(source)
    else:
        raise ValueError(
            f"prompts must be a list of texts, a .jsonl path or 'module:function', got {type(source).__name__}."
        )
    if not texts:
        raise ValueError("prompts are empty; give at least one.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"prompts must be texts; number {index} is a {type(text).__name__}: {text!r}.")
    return texts


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills empty columns. It means nothing: masks say what is real."""
    pad: Any = tokenizer.pad_token_id
    return 0 if pad is None else pad


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> Prompts:
    """Left-padded tokens of the texts. Refuses a prompt that is empty or longer than the budget."""
    encoded = [list(ids) for ids in tokenizer(list(texts)).input_ids]
    input_ids = torch.full((len(texts), max_prompt_tokens), pad_token_id(tokenizer), dtype=torch.long)
    attention_mask = torch.zeros(len(texts), max_prompt_tokens, dtype=torch.bool)
    for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if not ids or not text.strip():
            raise ValueError(f"prompt number {index} is empty ({text!r}); leave it out, or write a start of text.")
        if len(ids) > max_prompt_tokens:
            raise ValueError(
                f"prompt number {index} has {len(ids)} tokens, more than max_prompt_tokens={max_prompt_tokens} "
                f"({text[:60]!r}...); raise max_prompt_tokens to {max(map(len, encoded))} or shorten it."
            )
        input_ids[index, -len(ids) :] = torch.tensor(ids)
        attention_mask[index, -len(ids) :] = True
    return Prompts(tuple(texts), input_ids, attention_mask)


class PromptSampler:
    """Draws prompts in shuffled rounds, each prompt once a round; its state goes into checkpoints."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.generator = np.random.default_rng(seed)
        self.queue: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next `count` prompt indices."""
        while len(self.queue) < count:
            self.queue.extend(self.generator.permutation(self.size).tolist())
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped."""
        return {"queue": list(self.queue), "generator": json.dumps(self.generator.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.queue = list(state["queue"])
        self.generator.bit_generator.state = json.loads(state["generator"])


def _call(function: Callable, name: str) -> list[str]:
    texts = function()
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise ValueError(f"{name} must return a list of prompts, got {type(texts).__name__}.")
    return list(texts)


def _read_jsonl(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f'no prompts file at {str(path)!r}; give a .jsonl with one {{"prompt": ...}} a line.')
    texts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                texts.append(_read_line(path, number, line))
    return texts


def _read_line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{path}, line {number}: no text in the field "prompt", got {line.strip()[:80]!r}.')
    return row["prompt"]
