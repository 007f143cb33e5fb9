"""Records: responses token by token, with the numbers that the learner saw, for pictures, pages and files.

The numbers are those of the rollout: float32, each as the shortest decimal that reads back as the same float32. Tokens
that the policy wrote and all others, such as those of the prompt, are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.seeds import evaluation_seed
from agents.text.collector import TextCollector
from agents.text.evaluation import BATCH, Evaluation
from agents.text.networks import TextActor
from agents.text.rollout import Penalty, TextRollout, collect
from agents.trainer import Trainer
from textenv.generation import random_numbers
from textenv.kl import penalized_reward
from textenv.models.token_texts import TokenNames
from textenv.prompts.tokenized import Prompts
from textenv.rewards.normalization import RAW
from textenv.task import Task

ITERATIONS = 12  # of a run, of which records are kept
ROWS = 16  # responses that are kept of a rollout, and held-out prompts
TOKENS = 2_000  # that they may have together, if there is more than one
SAMPLED = 64  # most responses to held-out prompts, where a learner compares several to a prompt


@dataclass(frozen=True)
class Record:
    """One response. T of its L tokens are generated."""

    prompt: str
    tokens: list[str]  # L, prompt and response: the text of each by itself, see `TokenNames`
    ids: list[int]  # L
    generated: list[bool]  # L: written by the policy
    special: list[bool]  # L: tokens without a text, such as the end of a text; their names stand in `tokens`
    numbers: dict[str, list[float | None]]  # T each, see `numbers_of`; None where one is not finite
    score: float | None  # as the learner saw it; None without a reward
    raw_score: float | None  # before normalization; None without
    gold: float | None  # None without a gold rater
    kl: float  # Σ log π − log π_ref, in nats
    finish: str  # stop or length

    def as_json(self) -> dict[str, Any]:
        """All fields; truth values as 0 and 1."""
        flags = {"generated": [int(each) for each in self.generated], "special": [int(each) for each in self.special]}
        return asdict(self) | flags


def numbers_of(data: TensorDict) -> dict[str, Tensor]:
    """The numbers of every generated token, [B, R] each, in the order in which the learner forms them.

    `score`: the part of the reward that is score. `penalty`: β·KL_t. `reward`: r̃_t, their difference; where the
    KL is in the loss, the reward is the score alone, and there is no penalty. `log_prob`, `reference_log_prob`:
    log π(a_t|s_t), and the reference's. `entropy`: of the distribution that a_t was drawn from. `value`: V(s_t),
    of the state before the token. `td_error`: δ_t. `advantage`: A_t, before whitening. A learner without a critic
    has fewer, and a rollout that was not prepared.
    """
    prepared = "raw_advantage" in data  # else `reward` is the environment's, or not there
    coef = data["kl_coef"][:, None]
    penalty = data.get("penalty", None) if prepared else coef * data["kl"]
    numbers = {
        "score": data["step_score"],
        "penalty": penalty,
        "reward": data["reward"] if prepared else penalized_reward(data["step_score"], data["kl"], coef),
        "log_prob": data["action_log_prob"],
        "reference_log_prob": data["reference_log_prob"],
        "entropy": data.get("entropy", None),
        "value": data.get("state_value", None),
        "td_error": data.get("td_error", None),
        "advantage": data.get("raw_advantage", None),
    }
    return {name: values for name, values in numbers.items() if values is not None}


def iterations_to_keep(total: int) -> set[int]:
    """The iterations of which records are kept, the first and the last among them."""
    most = min(ITERATIONS, total)
    return {1 + round(at * (total - 1) / max(most - 1, 1)) for at in range(most)}


def rows_to_keep(group_size: int, longest: int) -> int:
    """How many rows of a rollout are kept: whole groups if there is room for one. longest: tokens of a text."""
    rows = max(1, min(ROWS, TOKENS // longest))
    return rows - rows % group_size if rows >= group_size else rows


def read_records(
    tokenizer: PreTrainedTokenizerBase,
    rollout: TextRollout,
    rows: Sequence[int],
    golds: Sequence[float] | None,
) -> list[Record]:
    """Records of some rows of a rollout that the learner has prepared.

    golds: gold scores of the rows; None without a gold rater.
    """
    index = torch.tensor(rows)
    data: Any = rollout.data.to("cpu")[index]
    prompts = [rollout.prompts[row] for row in rows]
    raw = rollout.scored.score_parts.get(RAW)
    names, numbers = TokenNames(tokenizer), numbers_of(data)
    log_ratio = (data["action_log_prob"] - data["reference_log_prob"]).where(data["mask"], 0.0).sum(1)
    records = []
    for at, row in enumerate(rows):
        mask, real = data["mask"][at], data["attention_mask"][at].bool()
        ids = data["input_ids"][at][real].tolist()
        generated = torch.cat([torch.zeros(len(real) - len(mask), dtype=torch.bool), mask])[real]
        records.append(
            Record(
                prompt=prompts[at],
                tokens=names(ids),
                ids=ids,
                generated=generated.tolist(),
                special=[names.is_special(token) for token in ids],
                numbers={name: decimals(values[at][mask]) for name, values in numbers.items()},
                score=decimal(data["score"][at]),
                raw_score=None if raw is None else decimal(raw[row].cpu()),
                gold=None if golds is None else float(golds[at]),
                kl=decimal(log_ratio[at]),
                finish=rollout.scored.finish_reason(row),
            )
        )
    return records


def held_out_records(trainer: Trainer, held_out: Prompts, golds: Sequence[float] | None) -> list[Record]:
    """What the learner says of responses to the first held-out prompts, by all ranks together.

    They are the responses of the evaluation: the same random numbers. A learner that compares the responses to a
    prompt gets further ones beside each, which are not returned. The KL is measured where β is 0 too.
    """
    collector, algorithm = trainer.collector, trainer.algorithm
    assert isinstance(collector, TextCollector)
    # Running statistics must not change.
    task = collector.measured.with_frozen_statistics()
    group, batch = task.config.group_size, min(len(held_out), collector.config.rollout_size)
    count = min(batch, rows_to_keep(1, task.config.width), max(1, SAMPLED // group))
    generator = torch.Generator(task.device).manual_seed(evaluation_seed())
    own = random_numbers(task, batch, generator)[:count, None]  # [n, 1, R], as the evaluation draws them
    others = random_numbers(task, count * (group - 1), generator).unflatten(0, (count, group - 1))
    chance = torch.cat([own, others], 1).flatten(0, 1)  # [n * G, R]
    prompts = held_out.select([row // group for row in range(count * group)])
    with collector.precision.tensor_cores():
        model, tokens = collector.sampling_model(algorithm.networks.policy), collector.config.micro_batch_tokens
        how = (collector.penalty(), collector.decoding, trainer.ranks)
        rollout = collect(task, model, prompts, chance, tokens, *how)
    rollout.data["entropy"] = collector.entropies(algorithm.networks.policy, rollout.data)
    algorithm.prepare(rollout.data)
    rows = range(0, count * group, group)
    return trainer.ranks.lead(lambda: read_records(task.tokenizer, rollout, rows, golds))


def policy_records(
    task: Task, model: PreTrainedModel, held_out: Prompts, evaluation: Evaluation, coef: float
) -> list[Record]:
    """Records of a policy without a learner: the first responses of its evaluation, by the same random numbers.

    coef: β of the penalty.
    """
    task = task.without_normalization().with_reference()
    batch = min(len(held_out), BATCH)
    count = min(batch, rows_to_keep(1, task.config.width))
    chance = random_numbers(task, batch, torch.Generator(task.device).manual_seed(evaluation_seed()))[:count]
    rollout = collect(task, model, held_out.select(range(count)), chance, None, Penalty(coef=coef))
    with torch.no_grad():
        rollout.data["entropy"] = TextActor(model, task.config.temperature).distribution(rollout.data).entropy()
    golds = None if evaluation.gold is None else evaluation.gold[:count]
    records = read_records(task.tokenizer, rollout, range(count), golds)
    return records if evaluation.score else [_without_score(record) for record in records]


def _without_score(record: Record) -> Record:
    """Where there is no reward, there is a penalty alone."""
    kept = {name: values for name, values in record.numbers.items() if name not in ("score", "reward")}
    return replace(record, score=None, numbers=kept)


def median_record(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of median length. records: as JSON."""
    return sorted(records, key=lambda record: sum(record["generated"]))[len(records) // 2]


def decimals(values: Tensor) -> list[float | None]:
    """Float32 numbers as the shortest decimals that read back as the same float32; None for one that is not finite."""
    numbers = [float(text) for text in values.numpy().astype(np.float32).astype(str)]
    return [number if math.isfinite(number) else None for number in numbers]


def decimal(value: Tensor) -> float:
    """See `decimals`. value: a finite scalar."""
    return float(str(np.float32(value)))
