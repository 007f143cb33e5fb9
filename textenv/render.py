"""A state as text for people."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from textenv.state import TextState


def ansi(state: TextState, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt in grey, response in the terminal's own colour."""
    ids, mask = state.input_ids[row].cpu(), state.attention_mask[row].cpu()
    width = state.prompt_width
    prompt = str(tokenizer.decode(ids[:width][mask[:width]].tolist(), skip_special_tokens=True))
    text = str(tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True))
    return f"\x1b[90m{prompt}\x1b[0m{text[len(prompt) :]}"
