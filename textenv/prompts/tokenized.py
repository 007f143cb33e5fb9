"""Tokenized prompts: texts, or chats through a tokenizer's chat template.

sources.py reads the prompts, samplers.py orders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, str]]  # a text, or the messages {role, content} of a chat


@dataclass(frozen=True)
class Prompts:
    """N prompts as texts and as left-padded tokens, with their further fields."""

    texts: tuple[str, ...]  # for a chat, the contents of its messages, one per line
    input_ids: Tensor  # int64 [N, P]
    attention_mask: Tensor  # bool [N, P]
    fields: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # further fields by name, N values each
    entries: tuple[Prompt, ...] = ()  # texts and chats as they were given; empty if they were not kept

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts with their tensors on `device`."""
        return Prompts(self.texts, self.input_ids.to(device), self.attention_mask.to(device), self.fields, self.entries)

    def select(self, indices: Sequence[int]) -> Prompts:
        """The prompts at these indices, in this order."""
        rows = torch.as_tensor(list(indices), dtype=torch.long, device=self.input_ids.device)
        return Prompts(
            tuple(self.texts[index] for index in indices),
            self.input_ids[rows],
            self.attention_mask[rows],
            {name: tuple(values[index] for index in indices) for name, values in self.fields.items()},
            tuple(self.entries[index] for index in indices) if self.entries else (),
        )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id in empty columns; 0 if the tokenizer has no pad token. Only masks tell which tokens are real."""
    pad: Any = tokenizer.pad_token_id
    return 0 if pad is None else pad


def tokenize(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, places: Sequence[str] = ()
) -> Prompts:
    """Tokenize texts and left-pad them to `max_prompt_tokens`.

    places: file and line of each prompt, for error messages; may be empty. Raises ValueError for a prompt that is
    empty, longer than the budget, or a chat.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"{_name(index, places)} is a chat (a list of messages), and chat is off; pass chat=True, or a text."
            )
    texts = [str(prompt) for prompt in prompts]
    encoded = [list(ids) for ids in tokenizer(texts).input_ids]
    _check_lengths(texts, encoded, max_prompt_tokens, places)
    return _pad(texts, encoded, tokenizer, max_prompt_tokens)


def tokenize_chats(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, places: Sequence[str] = ()
) -> Prompts:
    """Tokenize chats by the tokenizer's chat template, up to where the assistant is to speak, and left-pad them.

    A text becomes one message of the user. Raises ValueError for an empty or too long prompt, a tokenizer without a
    template, and messages that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat is on and the reference's tokenizer has no chat template; choose a chat model (often named "
            '"...-Instruct"), set tokenizer.chat_template and save it beside the model, or pass chat=False.'
        )
    rendered = []
    for index, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
        try:
            rendered.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses {_name(index, places)} ({error}); use the roles and the order of "
                "messages that the model was trained on."
            ) from error
    # The template already writes the special tokens.
    encoded = [list(ids) for ids in tokenizer(rendered, add_special_tokens=False).input_ids]
    texts = [_chat_text(prompt) for prompt in prompts]
    _check_lengths(texts, encoded, max_prompt_tokens, places)
    return _pad(texts, encoded, tokenizer, max_prompt_tokens)


def _chat_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _name(index: int, places: Sequence[str]) -> str:
    return f"prompt number {index} ({places[index]})" if places else f"prompt number {index}"


def _check_lengths(
    texts: Sequence[str], encoded: Sequence[list[int]], max_prompt_tokens: int, places: Sequence[str]
) -> None:
    for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if not ids or not text.strip():
            raise ValueError(f"{_name(index, places)} is empty ({text!r}); leave it out, or write some text.")
        if len(ids) > max_prompt_tokens:
            raise ValueError(
                f"{_name(index, places)} has {len(ids)} tokens, more than max_prompt_tokens={max_prompt_tokens} "
                f"({text[:60]!r}...); raise max_prompt_tokens to {max(map(len, encoded))} or shorten it."
            )


def _pad(
    texts: Sequence[str], encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> Prompts:
    input_ids = torch.full((len(texts), max_prompt_tokens), pad_token_id(tokenizer), dtype=torch.long)
    attention_mask = torch.zeros(len(texts), max_prompt_tokens, dtype=torch.bool)
    for index, ids in enumerate(encoded):
        input_ids[index, -len(ids) :] = torch.tensor(ids)
        attention_mask[index, -len(ids) :] = True
    return Prompts(tuple(texts), input_ids, attention_mask)
