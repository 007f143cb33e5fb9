"""The rows that the trainings take, and their tokens: texts, prompts and responses, chats, preferences, labels.

A row is a line of a JSONL file. Texts and chats stand in the same fields; a chat is a list of messages
`{"role": ..., "content": ...}`, for tokenizers with a chat template.

| training | row |
|---|---|
| supervised | `{"text"}`; `{"prompt", "response"}`, the second also named `"completion"`; `{"messages"}`, a chat |
| preferences | `{"prompt"?, "chosen", "rejected", "margin"?}`; what two chats begin with alike is the prompt |
| labels | `{"prompt"?, "text", "label"}`, texts, label 0 or 1 |

These are TRL's formats too, its prompt and completion or preferences as texts or as chats. Other fields are ignored. A
text is put a space after its prompt, as a policy of this package continues one; a chat template puts what it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from textenv.json_lines import read_json_lines
from textenv.models.encoding import encode, encode_pairs, end_with
from textenv.prompts.sources import is_chat

Row = dict[str, Any]
Text = str | Sequence[Mapping[str, str]]  # a text, or the messages of a chat
Exchange = tuple[Text | None, Text]  # a prompt, or None, and what follows it

PREFERENCE = '{"prompt": "...", "chosen": "...", "rejected": "..."} or {"text": "...", "label": 1}'
SUPERVISED = '{"text": "..."}, {"prompt": "...", "response": "..."} or {"messages": [{"role": ..., "content": ...}]}'


def read_rows(path: str | Path) -> list[Row]:
    """Read preferences or labels, all of one kind. Chats get their prompt as a field."""
    return _read(path, PREFERENCE, _preference_or_label)


def read_supervised(path: str | Path) -> list[Row]:
    """Read rows of supervised training, all of one kind, as `{"prompt"?, "response"}`; a text has no prompt."""
    return _read(path, SUPERVISED, _supervised)


def _read(path: str | Path, example: str, check: Callable[[Row, str], Row]) -> list[Row]:
    path, rows = Path(path), []
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError(f"{str(path)!r} is a pipe or a device, and data are read more than once; write a file.")
        raise ValueError(f"no training data at {str(path)!r}; give a .jsonl file of lines such as {example}.")
    for place, row in read_json_lines(path, example):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: needs an object with fields, got {type(row).__name__}. Write {example}.")
        rows.append(check(row, place))
        if _form(rows[-1]) != _form(rows[0]):
            raise ValueError(f"{place}: the file mixes rows of {_form(rows[0])} and of {_form(rows[-1])}. Split it.")
    if not rows:
        raise ValueError(f"{path} has no rows. Write one JSON object per line, such as {example}.")
    return rows


def kind_of(row: Mapping[str, Any]) -> str:
    """Which rows these are: "pairs" of preferences, "labeled" texts, or "supervised"."""
    return "labeled" if "label" in row else "pairs" if "chosen" in row else "supervised"


def _form(row: Row) -> str:
    """What all rows of a file share, in words. A prompt may be left out of some."""
    kinds = {"pairs": "pairs", "labeled": "texts with labels", "supervised": "supervised training"}
    whole = kind_of(row) == "supervised" and "prompt" not in row
    chats = any(isinstance(value, list) for value in row.values())
    margin = " with a margin" if "margin" in row else ""
    return kinds[kind_of(row)] + (" (texts without prompts)" if whole else " (chats)" if chats else "") + margin


# ---- rows


def _preference_or_label(row: Row, place: str) -> Row:
    if {"chosen", "rejected"} <= row.keys():
        return _preference(row, place) | _margin(row, place)
    if {"text", "label"} <= row.keys():
        if isinstance(row["label"], bool) or row["label"] not in (0, 1):
            raise ValueError(
                f"{place}: label must be 0 or 1, got {row['label']!r}. Map your labels to 0 (bad), 1 (good)."
            )
        if "margin" in row:
            raise ValueError(f"{place}: a margin belongs to a pair, and this row has a label. Leave the margin out.")
        return _texts(row, place, "prompt", "text") | {"label": row["label"]}
    raise ValueError(
        f"{place}: needs chosen and rejected, or text and label; got fields {sorted(row)}. Write {PREFERENCE}."
    )


def _preference(row: Row, place: str) -> Row:
    if not is_chat(row["chosen"]) and not is_chat(row["rejected"]):
        return _texts(row, place, "prompt", "chosen", "rejected")
    sides = {name: _messages(row[name], place, name) for name in ("chosen", "rejected")}
    if is_chat(row.get("prompt")):
        prompt = list(row["prompt"])
    else:  # the messages that both begin with; a text in `prompt` is one of them in some data sets, and says no more
        same = [one == other for one, other in zip(*sides.values(), strict=False)]
        prompt = sides["chosen"][: (*same, False).index(False)]
        sides = {name: messages[len(prompt) :] for name, messages in sides.items()}
    if row["chosen"] == row["rejected"] and not all(sides.values()):
        raise ValueError(f"{place}: chosen and rejected are the same chat, which prefers nothing. Leave the row out.")
    if not prompt or not all(sides.values()):
        raise ValueError(
            f"{place}: chosen and rejected must be chats that begin with the same messages and end with different "
            'ones, or follow a chat in the field prompt. Write {"prompt": [...], "chosen": [...], "rejected": [...]}.'
        )
    return {"prompt": prompt, **{name: _answer(messages, place, name) for name, messages in sides.items()}}


def _margin(row: Row, place: str) -> Row:
    """By how much the score of `chosen` should exceed that of `rejected`, if the row says so."""
    margin = row.get("margin", 0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin < 0:
        raise ValueError(
            f"{place}: margin must be a number of 0 or more, got {margin!r:.200}: by how much the score of chosen "
            "should exceed that of rejected. Where rejected is the better one, swap them."
        )
    return {"margin": margin} if "margin" in row else {}


def _supervised(row: Row, place: str) -> Row:
    if "messages" in row:
        messages = _messages(row["messages"], place, "messages")
        first = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), 0)
        if first == 0:
            raise ValueError(
                f"{place}: messages must have one of the role assistant, after the messages that it answers; the roles "
                f"are {[message['role'] for message in messages]}."
            )
        return {"prompt": messages[:first], "response": messages[first:]}
    responses = [name for name in ("response", "completion") if name in row]
    if "prompt" in row and len(responses) == 1:
        if is_chat(row["prompt"]):
            answer = _messages(row[responses[0]], place, responses[0])
            return {"prompt": list(row["prompt"]), "response": _answer(answer, place, responses[0])}
        texts = _texts(row, place, "prompt", responses[0])
        return {"prompt": texts["prompt"], "response": texts[responses[0]]}
    if "text" in row:
        texts = _texts(row, place, "prompt", "text")
        return {name: texts[old] for name, old in (("prompt", "prompt"), ("response", "text")) if old in texts}
    raise ValueError(
        f"{place}: needs text, or prompt and response, or messages; got fields {sorted(row)}. Write {SUPERVISED}."
    )


def _texts(row: Row, place: str, *names: str) -> Row:
    for name in set(names) & row.keys():
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: {name} must be a string, got {row[name]!r:.200}. {_remedy(row[name])}")
    return {name: row[name] for name in names if name in row}


def _remedy(value: Any) -> str:
    """What to do about a value that should be a text."""
    if value is None:
        return "Write a text, or leave the row out."
    if is_chat(value):
        return "Write the texts of a row as chats, all of them, or none; labels are of texts."
    if isinstance(value, list | dict):
        return "Write one text."
    return "Put it in quotes."


def _messages(value: Any, place: str, name: str) -> list[dict[str, str]]:
    if not is_chat(value):
        raise ValueError(
            f'{place}: {name} must be a list of messages {{"role": "user", "content": "..."}}, texts both, got '
            f"{value!r:.200}."
        )
    return list(value)


def _answer(messages: list[dict[str, str]], place: str, name: str) -> list[dict[str, str]]:
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: {name} must begin and end with a message of the role assistant, got the roles "
            f"{[message['role'] for message in messages]}."
        )
    return messages


# ---- tokens


@dataclass(frozen=True)
class Encoded:
    """A prompt and what follows it, as tokens, the end token included."""

    ids: list[int]
    written: list[bool]  # which tokens a policy writes: the response, or every turn of the assistant with its end
    prompt: int  # how many of the tokens are the prompt, up to where the policy begins

    def __len__(self) -> int:
        return len(self.ids)


def encode_exchanges(
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    stops: Collection[int] = (),
    template: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """The tokens of prompts and responses: all texts, or all chats.

    A text ends with the end token. Of a chat, what comes after the last turn of the assistant is left out, and an end
    token is added where the template wrote none of `stops`, the tokens that end the model's responses.

    template: variables of the chat template. Raises ValueError for a chat without a template, and for a template that
    changes earlier turns.
    """
    if any(not isinstance(response, str) for _, response in exchanges):
        chats: Any = [(list(prompt or []), response) for prompt, response in exchanges]
        ends = _end_texts(tokenizer, stops)
        return [_encode_chat(tokenizer, prompt, response, ends, template or {}) for prompt, response in chats]
    with_prompt = [index for index, (prompt, _) in enumerate(exchanges) if prompt is not None]
    encoded = [([], ids) for ids in encode(tokenizer, [str(response) for _, response in exchanges])]
    pairs = encode_pairs(tokenizer, [(str(exchanges[index][0]), str(exchanges[index][1])) for index in with_prompt])
    for index, pair in zip(with_prompt, pairs, strict=True):
        encoded[index] = pair
    ended = [(prompt, end_with(tokenizer, response)) for prompt, response in encoded]
    return [
        Encoded([*prompt, *response], [False] * len(prompt) + [True] * len(response), len(prompt))
        for prompt, response in ended
    ]


def _end_texts(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> dict[int, str]:
    """The text of each stop token. Ids that the tokenizer has no token for are left out: a vocabulary may be padded."""
    known = set(tokenizer.get_vocab().values())
    texts = {stop: str(tokenizer.decode([stop])) for stop in sorted(stops) if stop in known}
    return {stop: text for stop, text in texts.items() if text}


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Mapping[str, str]],
    response: Sequence[Mapping[str, str]],
    stops: Mapping[int, str],
    template: Mapping[str, Any],
) -> Encoded:
    """The turns of the assistant are found by rendering the chat up to each, since few templates mark them.

    A turn ends with its first stop token: some templates write more behind it, which no policy writes. stops: their
    texts.
    """
    messages = [dict(message) for message in (*prompt, *response)]
    text, ids, written, begin = "", [], [], 0
    for turn in (at for at in range(len(prompt), len(messages)) if messages[at]["role"] == "assistant"):
        before = _render(tokenizer, messages[:turn], template, add_generation_prompt=True)
        through = _render(tokenizer, messages[: turn + 1], template)
        start = messages[turn]["content"][:60]
        if not before.startswith(text):
            raise ValueError(
                "the chat template writes earlier turns of a chat differently once later ones follow, so the "
                f"assistant's tokens cannot be told apart (in {start!r}); give rows with one response each, or another "
                "template."
            )
        if not through.startswith(before) or len(through.rstrip()) <= len(before):
            raise ValueError(
                "the chat template begins a response differently where it asks for one (add_generation_prompt) and "
                f"where there is one (in {start!r}); set the template's variables, or give another template."
            )
        found = [(through.find(end, len(before)), len(end)) for end in stops.values()]
        stopped = [at + length for at, length in found if at >= 0]
        through = through[: min(stopped)] if stopped else through.rstrip()
        ids = _continued(tokenizer, ids, text, before)
        written += [False] * (len(ids) - len(written))
        begin = begin or len(ids)
        text, ids = through, _continued(tokenizer, ids, before, through)
        written += [True] * (len(ids) - len(written))
    if ids[-1] not in stops:
        ended = end_with(tokenizer, ids)
        ids, written = ended, written + [True] * (len(ended) - len(ids))
    return Encoded(ids, written, begin)


def _continued(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, longer: str) -> list[int]:
    """The tokens of a rendered chat that go on after those of its beginning.

    Where a token would reach over the border, as of a line break before an answer and one in it, both parts are
    tokenized apart: the policy goes on from the tokens that it was given.
    """
    whole = _tokens(tokenizer, longer)
    return whole if whole[: len(ids)] == ids else [*ids, *_tokens(tokenizer, longer[len(text) :])]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: Mapping[str, Any], **options: bool
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the data are chats and the tokenizer has no chat template; choose a chat model (often named "
            '"...-Instruct"), or set tokenizer.chat_template and save it beside the model.'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **{**template, **options}))
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        raise ValueError(
            f"the chat template refuses a chat of the roles {[message['role'] for message in messages]} ({error}); use "
            "the roles and the order of messages that the model was trained on."
        ) from error


def _tokens(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """The template already writes the special tokens."""
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids)


def describe(exchange: Exchange) -> str:
    """The start of a row, for messages."""
    prompt, response = exchange
    return f"the row {str(response if prompt is None else (prompt, response))[:80]!r}"
