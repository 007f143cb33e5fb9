"""Tokenized prompts: texts, or chats through a tokenizer's chat template.

A prompt has the tokenizer's start tokens once and never its end tokens, since the policy goes on from it. sources.py
reads the prompts, samplers.py orders them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textenv.models.encoding import check_ids, encode

# Arguments of `apply_chat_template` that are not variables of a template.
DECIDED = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents"} | {"messages"}
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


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts for one model and left-pads them to one width."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # V
    max_prompt_tokens: int  # P
    chat: bool = False  # whether the chat template writes the prompts
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # further variables of the template

    def __post_init__(self) -> None:
        if self.chat:
            check_template_arguments(self.tokenizer, self.chat_template_kwargs)

    def __call__(self, prompts: Sequence[Prompt], places: Sequence[str] = ()) -> Prompts:
        """Tokenize prompts.

        places: file and line of each prompt, for error messages; may be empty. Raises ValueError that names the first
        prompt that is empty, too long, a chat where chat is off, refused by the template, or has a token that the
        model lacks.
        """
        encoded = self._encode_chats(prompts, places) if self.chat else self._encode_texts(prompts, places)
        texts = [_text(prompt) for prompt in prompts]
        self._check(texts, encoded, places)
        return self._pad(texts, encoded)

    def _encode_texts(self, prompts: Sequence[Prompt], places: Sequence[str]) -> list[list[int]]:
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{_name(index, places)} is a chat (a list of messages), and chat is off; pass chat=True, or a "
                    "text."
                )
            _check_text(prompt, _name(index, places))
        return encode(self.tokenizer, [str(prompt) for prompt in prompts])

    def _encode_chats(self, prompts: Sequence[Prompt], places: Sequence[str]) -> list[list[int]]:
        """The tokens up to where the assistant is to speak. A text is one message of the user."""
        rendered = []
        for index, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
            try:
                rendered.append(
                    self.tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
                    )
                )
            except Exception as error:  # a template is a program of the model's author, and may raise anything
                raise ValueError(
                    f"the chat template refuses {_name(index, places)} ({error}); use the roles and the order of "
                    "messages that the model was trained on."
                ) from error
            _check_text(rendered[-1], _name(index, places))
        # The template already writes the special tokens.
        return [list(ids) for ids in self.tokenizer(rendered, add_special_tokens=False).input_ids]

    def _check(self, texts: Sequence[str], encoded: Sequence[list[int]], places: Sequence[str]) -> None:
        for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if not ids or not text.strip():
                raise ValueError(f"{_name(index, places)} is empty ({text!r}); leave it out, or write some text.")
            if len(ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"{_name(index, places)} has {len(ids)} tokens, more than "
                    f"max_prompt_tokens={self.max_prompt_tokens} ({text[:60]!r}...); raise max_prompt_tokens to "
                    f"{max(map(len, encoded))} or shorten it."
                )
        check_ids(self.tokenizer, encoded, self.vocabulary, lambda i: f"{_name(i, places)} ({texts[i][:60]!r})")

    def _pad(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> Prompts:
        shape = (len(texts), self.max_prompt_tokens)
        input_ids = torch.full(shape, pad_token_id(self.tokenizer, self.vocabulary), dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for index, ids in enumerate(encoded):
            input_ids[index, -len(ids) :] = torch.tensor(ids)
            attention_mask[index, -len(ids) :] = True
        return Prompts(tuple(texts), input_ids, attention_mask)


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """The id in empty columns: the pad token, or 0 where there is none or the model, of V ids, has no row for it.

    Any id would do, since masks alone tell which tokens are real.
    """
    pad: Any = tokenizer.pad_token_id
    return pad if pad is not None and 0 <= pad < vocabulary else 0


def check_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a tokenizer without a chat template, and for arguments that its template does not take."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat is on and the reference's tokenizer has no chat template; choose a chat model (often named "
            '"...-Instruct"), set tokenizer.chat_template and save it beside the model, or pass chat=False.'
        )
    try:
        template = tokenizer.get_chat_template(tools=arguments.get("tools"))
    except ValueError as error:  # several templates, none of them the default
        raise ValueError(f"chat is on and the tokenizer has no default chat template: {error}") from error
    for name in arguments:
        if name in DECIDED:
            raise ValueError(f"chat_template_kwargs has {name!r}, which the environment decides; leave it out.")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"chat_template_kwargs has {name!r}, which the reference's chat template does not read, so it would "
                "have no effect; check its name in the model's documentation, or leave it out."
            )


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, that no encoding can write; remove it."
        ) from error


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _name(index: int, places: Sequence[str]) -> str:
    return f"prompt number {index} ({places[index]})" if places else f"prompt number {index}"
