"""Samples from the supervised model, from its full distribution at a temperature, up to 48 new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.models.encoding import encode

MAX_NEW_TOKENS = 48  # token budget of the task


class Sample(NamedTuple):
    """One sampled response."""

    prompt: str
    tokens: list[int]  # of the response, with its end token if there is one
    text: str  # without the end token
    finished: bool  # whether the end token came within the budget


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int,
    temperature: float,
    batch_size: int = 512,
) -> list[Sample]:
    """One response to each prompt, in order."""
    torch.manual_seed(seed)  # generate() uses the global generator
    model.eval()
    samples = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": encode(tokenizer, batch)},
            padding_side="left",
            return_tensors="pt",
        )
        written = model.generate(  # type: ignore[operator]
            **padded.to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, padded["input_ids"].shape[1] :]  # [B, R]
        samples += [_sample(tokenizer, p, row) for p, row in zip(batch, written.tolist(), strict=True)]
    return samples


def _sample(tokenizer: PreTrainedTokenizerBase, prompt: str, row: list[int]) -> Sample:
    end = tokenizer.eos_token_id
    finished = end in row
    tokens = row[: row.index(end) + 1] if finished else row
    text = str(tokenizer.decode(tokens[:-1] if finished else tokens))
    return Sample(prompt, tokens, text, finished)
