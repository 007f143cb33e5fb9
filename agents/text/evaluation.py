"""Evaluation of a policy on held-out prompts: score, gold score, KL to the reference, length, diversity, samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from agents.ranks import ALONE, Ranks
from agents.seeds import torch_generator
from agents.text.config import TextConfig
from agents.text.rollout import readers, write
from agents.text.sharding import whole
from textenv.generation import Generation, random_numbers, score_responses
from textenv.models.decoding import Decoding
from textenv.models.loading import load_function
from textenv.prompts.tokenized import Prompts
from textenv.reviews.gold import gold as gold_of_reviews
from textenv.reviews.prompts import held_out_prompts
from textenv.state import STOP, own_settings
from textenv.task import Task, is_embedded

BATCH = 128  # responses generated at a time, which determines their random numbers

Gold = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Evaluation:
    """One response to each prompt, with its measurements."""

    prompts: list[str]
    responses: list[str]
    score: list[float]  # empty without a reward
    gold: list[float] | None  # None without a gold rater
    kl: list[float]  # log π − log π_ref summed over each response, nats
    length: list[int]  # tokens
    stopped: list[bool]

    def summary(self) -> dict[str, float]:
        """Means over the prompts, and the standard deviation of the scores."""
        scores = torch.tensor(self.score)
        score = {"score": mean(self.score), "score_std": float(scores.std(correction=0))} if self.score else {}
        numbers = score | {
            "kl_per_response": mean(self.kl),
            "length": mean(self.length),
            "stopped": mean(self.stopped),
            "distinct_bigrams": distinct_bigrams(self.responses),
        }
        return numbers if self.gold is None else numbers | {"gold": mean(self.gold)}


@own_settings()
def evaluate(
    task: Task,
    model: PreTrainedModel,
    prompts: Prompts,
    gold: Gold | None,
    seed: int,
    batch: tuple[int, int | None] = (BATCH, None),
    decoding: Decoding | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Sample one response per prompt at the task's temperature and measure it. Same seed, same responses.

    Scores are the reward's own, before normalization, so that evaluations can be compared. The KL is measured where
    `kl_coef` is 0 too.
    batch: responses generated at a time (which determines their random numbers), and tokens per forward pass.
    decoding: how they are generated. ranks: each takes a part of every batch.
    """
    task = task.without_normalization().with_reference()
    generator = torch.Generator(task.device).manual_seed(seed)
    parts: list[Evaluation] = []
    for rows in torch.arange(len(prompts)).split(batch[0]):
        numbers, own = random_numbers(task, len(rows), generator), ranks.share(len(rows))
        part = prompts.select(rows[own].tolist())
        with whole(model):
            generation = ranks.together(partial(write, task, model, part, numbers[own], decoding))
        with whole(*readers(task)):
            measured = ranks.each(partial(_measure, task, part, generation, batch[1]))
        parts += [each for each in measured if each is not None]
    gathered: dict[str, Any] = {
        field.name: [value for part in parts for value in getattr(part, field.name) or []]
        for field in dataclasses.fields(Evaluation)
    }
    evaluation = Evaluation(**gathered)
    if gold is None:
        return dataclasses.replace(evaluation, gold=None)
    golds = ranks.lead(lambda: rate(gold, evaluation.prompts, evaluation.responses))
    return dataclasses.replace(evaluation, gold=golds)


def rate(gold: Gold, prompts: list[str], responses: list[str]) -> list[float]:
    """Gold scores, one per response. Raises ValueError if the function returns anything else."""
    scores = [float(score) for score in gold(prompts, responses)]
    if len(scores) != len(responses) or not all(math.isfinite(score) for score in scores):
        raise ValueError(
            f"gold must return a finite number for each of {len(responses)} responses, got {len(scores)}: "
            f"{scores[:5]}... Check the function passed as --gold."
        )
    return scores


def _measure(
    task: Task, prompts: Prompts, generation: Generation | None, tokens_per_pass: int | None
) -> Evaluation | None:
    """Evaluate one batch, without gold scores, by one forward of the reference and of the reward model."""
    if generation is None:
        return None
    scored = score_responses(task, generation.state, prompts.texts, tokens_per_pass, prompts.fields)
    return Evaluation(
        prompts=list(prompts.texts),
        responses=scored.responses,
        score=scored.score.tolist(),
        gold=None,
        kl=(generation.log_prob - scored.reference_log_prob).sum(1).tolist(),
        length=generation.state.generated_length.tolist(),
        stopped=(scored.finish_code == STOP).tolist(),
    )


def split_prompts(task: Task, config: TextConfig, seed: int = 0) -> tuple[Prompts, Prompts]:
    """Training prompts and evaluation prompts, with no text in common.

    Evaluation prompts come from `held_out`; without it from the embedded task if its prompts are used, else they are a
    random part of the environment's prompts, at most a fifth, drawn from the seed. Raises ValueError if one is empty.
    """
    if config.held_out is not None or is_embedded(task.config.prompts):
        source = held_out_prompts if config.held_out is None else config.held_out
        held_out = task.read_prompts(source)
        held_out = held_out.select(range(min(config.evaluation_prompts, len(held_out))))
        held_out_texts = set(held_out.texts)
        kept = [index for index, text in enumerate(task.prompts.texts) if text not in held_out_texts]
        if not kept:
            raise ValueError(
                "every prompt of the environment is in held_out; none is left to train on. Add other prompts."
            )
        return task.prompts.select(kept), held_out
    unique = list(dict.fromkeys(task.prompts.texts))  # a repeated text must not be on both sides
    size = len(unique)
    if size < 2:
        raise ValueError(
            f"the environment has {size} different prompts, too few to hold any out; give more, or set --held-out."
        )
    count = max(1, min(config.evaluation_prompts, size // 5))
    order = torch.randperm(size, generator=torch_generator(seed, "split")).tolist()
    held_out_texts = {unique[index] for index in order[:count]}
    kept = [index for index, text in enumerate(task.prompts.texts) if text not in held_out_texts]
    first_indices = sorted(task.prompts.texts.index(text) for text in held_out_texts)
    return task.prompts.select(kept), task.prompts.select(first_indices)


def find_gold(task: Task, config: TextConfig) -> Gold | None:
    """The gold rater, whose scores are reported and never optimized: --gold, the embedded task's, or None."""
    if config.gold is not None:
        return load_function(config.gold)
    embedded = is_embedded(task.config.prompts) and is_embedded(task.config.reference)
    return gold_of_reviews if embedded else None


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return float(sum(values) / len(values))


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Share of distinct pairs among all pairs of neighboring words (distinct-2, Li et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)
