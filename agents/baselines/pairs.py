"""Preference pairs for a task: read from a file, or two samples of the reference between which the reward chooses.

Owns how they become tokens: prompts as the environment writes them, responses with a stop token, token in, token out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from agents.baselines.setting import Setting
from agents.reporting.report import Bar
from agents.seeds import torch_generator
from textenv.generation import generate, random_numbers, score_responses
from textenv.models.encoding import check_ids
from textenv.models.language_model import position_limit
from textenv.models.sampling import Sampling
from textenv.state import own_settings
from textenv.task import Task
from textenv.training.data import Encoded, Text, describe, encode_exchanges, read_rows
from textenv.training.dpo import Preference

AT_ONCE = 512  # responses that are sampled at a time

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """N pairs: what they say, and their tokens."""

    rows: list[Row]  # {prompt, chosen, rejected}, texts or chats
    pairs: list[Preference]

    def hash(self) -> str:
        """SHA-256 of the tokens."""
        tokens = [[*pair.prompt, -1, *pair.chosen, -1, *pair.rejected] for pair in self.pairs]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def select(self, indices: Sequence[int]) -> Rows:
        """The pairs at these indices."""
        return Rows([self.rows[index] for index in indices], [self.pairs[index] for index in indices])


def read_pairs(path: Path) -> list[Row]:
    """The rows of a JSONL of {prompt, chosen, rejected}, texts or chats. Raises ValueError for any other."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if "chosen" not in row or not row.get("prompt"):
            raise ValueError(
                f"{path}, row {number}: needs prompt, chosen and rejected, got {', '.join(sorted(row))}; the policy "
                "learns responses to prompts."
            )
    return rows


def tokenize(rows: list[Row], task: Task, max_length: int) -> Rows:
    """The tokens of rows. Responses end with a stop token; what is longer than `max_length` loses its end.

    Where the environment writes prompts by the chat template, texts become chats. Raises ValueError for a token that
    the model lacks, and where there is no room for a response.
    """
    limit = min(max_length, position_limit(task.load_reference().model) or max_length)
    columns: list[list[Encoded]] = []
    for name in ("chosen", "rejected"):
        exchanges = [_exchange(row["prompt"], row[name], task.config.chat) for row in rows]
        encoded = encode_exchanges(task.tokenizer, exchanges, task.stop_token_ids, task.config.chat_template_kwargs)
        ids = [each.ids for each in encoded]
        check_ids(task.tokenizer, ids, task.vocabulary, lambda i, own=exchanges: describe(own[i]))
        columns.append(encoded)
    return Rows(rows, [_preference(row, both, task, limit) for row, *both in zip(rows, *columns, strict=True)])


def _exchange(prompt: Text, response: Text, chat: bool) -> tuple[Text, Text]:
    """A prompt and its response, both as chats if chats are wanted."""
    if not chat:
        return prompt, response
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return asked, [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _preference(row: Row, both: Sequence[Encoded], task: Task, limit: int) -> Preference:
    prompt = both[0].ids[: both[0].prompt]
    if both[1].ids[: both[1].prompt] != prompt or not all(all(each.written[each.prompt :]) for each in both):
        raise ValueError(
            f"the pair {str(row['prompt'])[:60]!r} has a response of several turns, and the policy writes one; give "
            "pairs whose chosen and rejected are one message of the assistant."
        )
    if len(prompt) >= limit:
        raise ValueError(
            f"the prompt {str(row['prompt'])[:60]!r} has {len(prompt)} tokens, which leaves no room for a response in "
            f"max_length={limit}; raise max_length, or shorten the prompt."
        )
    stops = task.stop_token_ids
    responses = [each.ids[each.prompt :] for each in both]
    ended = [each if each[-1] in stops else [*each[:-1], stops[0]] for each in responses]  # another end token
    return Preference(prompt, *(each[: limit - len(prompt)] for each in ended))


def text_of(prompt: Text) -> str:
    """A prompt as the environment names it: of a chat, the contents of its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


@own_settings()
def sample_pairs(setting: Setting, count: int, seed: int, console: Console) -> Rows:
    """Two responses of the reference to each of `count` training prompts, the choice drawn by the reward.

    The first is chosen with probability σ(score − other score), so the scores are log-odds (Bradley-Terry). Under this
    choice the optimum of DPO's loss is that of the environment's objective, score − β·KL. Equal responses are left out.
    """
    task = replace(setting.task.without_normalization(), reference=None)
    model, generator = task.load_reference().model, torch_generator(seed, "pairs", task.device)
    order = [
        index
        for _ in range(-(-count // len(setting.training)))
        for index in torch.randperm(len(setting.training), generator=generator, device=task.device).tolist()
    ]
    rows, pairs = [], []
    with Bar(console, count, 0, ("sampling pairs", "pair")) as bar:
        for start in range(0, count, AT_ONCE // 2):
            indices = [index for index in order[start : min(start + AT_ONCE // 2, count)] for _ in range(2)]
            prompts = setting.training.select(indices)
            numbers = random_numbers(task, len(indices), generator)
            state = generate(task, model, prompts, Sampling(temperature=task.config.temperature), numbers).state
            scored = score_responses(task, state, prompts.texts, fields=prompts.fields)
            tokens = [state.response_ids[row][state.response_mask[row]].tolist() for row in range(len(indices))]
            odds = (scored.score[::2] - scored.score[1::2]).double().sigmoid()
            first = torch.rand(len(odds), dtype=torch.float64, generator=generator, device=task.device) < odds
            for pair, keeps in enumerate(first.tolist()):
                won, lost = (2 * pair, 2 * pair + 1) if keeps else (2 * pair + 1, 2 * pair)
                if tokens[won] == tokens[lost]:
                    continue
                prompt = prompts.input_ids[won][prompts.attention_mask[won]].tolist()
                pairs.append(Preference(prompt, tokens[won], tokens[lost]))
                rows.append(_described(prompts.texts[won], scored.responses, scored.score.tolist(), (won, lost)))
            bar.show(min(start + AT_ONCE // 2, count), "chosen by the reward")
    if not pairs:
        raise ValueError(
            f"the reference wrote both responses of every pair alike, {count} times, and nothing can be learned from "
            "those; raise --env.temperature or --env.max-new-tokens, or give pairs of your own with --data."
        )
    return Rows(rows, pairs)


def _described(prompt: str, responses: Sequence[str], scores: Sequence[float], who: tuple[int, int]) -> Row:
    won, lost = who
    return {
        "prompt": prompt,
        "chosen": responses[won].removeprefix(" "),
        "rejected": responses[lost].removeprefix(" "),
        "chosen_score": scores[won],
        "rejected_score": scores[lost],
    }
