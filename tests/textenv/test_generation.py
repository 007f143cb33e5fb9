"""The fast path's judge refuses what it cannot judge."""

from __future__ import annotations

import pytest
import torch

from tests.support import tiny
from textenv import TextGenConfig, build_task
from textenv.generation import score_responses
from textenv.state import TextState


@pytest.mark.parametrize("length", [0, 3])
def test_an_unfinished_response_is_refused(settings, length):
    """A response without an end, empty or not, gets a ValueError that names its row, and no score."""
    task = build_task(TextGenConfig(**settings))
    width = settings["max_prompt_tokens"]
    ids = torch.full((1, task.width), tiny.END)  # the end token as padding must not pass for an end
    ids[0, width : width + length] = 65
    mask = torch.zeros(1, task.width, dtype=torch.bool)
    mask[0, width - 2 : width + length] = True
    state = TextState(ids, mask, torch.tensor([length]), width)
    with pytest.raises(ValueError, match="finished responses, and row 0"):
        score_responses(task, state, ["a prompt"])
