"""Finished responses written by hand, for tests of rewards."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from textenv.rewards.base import ResponseBatch
from textenv.state import start


def written(prompts, responses, tokenizer: PreTrainedTokenizerFast, stopped=True, **more) -> ResponseBatch:
    """ResponseBatch of the given prompt and response ids."""
    width, room = max(map(len, prompts)) + 2, max(map(len, responses)) + 1
    ids = torch.tensor([[9] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    state = start(ids, mask, room, 0)
    for step in range(room):
        tokens = [response[step] if step < len(response) else -1 for response in responses]
        state = state.append(torch.tensor(tokens), torch.tensor(tokens) >= 0)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    stops = torch.as_tensor(stopped).expand(len(prompts)).clone()
    return ResponseBatch(texts, state, stops, tokenizer, **more)
