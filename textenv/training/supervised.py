"""Stage 1 of RLHF: supervised fine-tuning of a causal language model on texts, on prompts and responses, or on chats.

A prompt is tokenized alone and the response behind it, so generation starts from the same prompt tokens as in training.
The loop is Transformers' Trainer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.modeling_outputs import CausalLMOutput

from textenv.models.encoding import check_ids
from textenv.models.language_model import position_limit
from textenv.settings import check_types
from textenv.training.data import Encoded, Exchange, describe, encode_exchanges
from textenv.training.loop import (
    Job,
    Measure,
    Trained,
    check_training,
    grouped_by_length,
    pad_right,
    train,
    training_arguments,
)
from textenv.training.muon import muon_for

IGNORED = -100  # label of a token without loss; fixed by Transformers
MUON_LEARNING_RATE = 0.02


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Settings of supervised fine-tuning."""

    learning_rate: float = 5e-5  # peak, after a short warm-up; then cosine decay to zero
    epochs: float = 1.0  # passes over the data
    batch_size: int = 32  # rows per optimizer step
    gradient_accumulation: int = 1  # forwards per optimizer step, to save memory; divides batch_size
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of a GPT-2 that is trained from scratch
    muon_learning_rate: float | None = None  # of the matrices, 0.02 by default; learning_rate, constant, of the rest
    weight_decay: float = 0.01  # decoupled, as in AdamW
    loss_on: Literal["responses", "all"] = "responses"  # all: on the tokens of prompts too
    held_out: float = 0.05  # share of the prompts held out by the command, for the reported loss
    max_length: int = 512  # tokens per row, at most the model's positions; longer rows lose the end of the response
    seed: int = 0  # of the order of the data, the choice of held-out prompts, and the samples on the card

    def __post_init__(self) -> None:
        check_types(self)
        check_training(self)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), a share of the prompts, got {self.held_out}.")
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("muon_learning_rate is read with optimizer muon only; leave it out, or choose muon.")
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(f"muon_learning_rate must be positive, got {self.muon_learning_rate}.")


@dataclass(frozen=True)
class Rows:
    """Tokenized rows, each with at least one token that has a loss."""

    encoded: list[Encoded]  # cut to the greatest length
    scored: list[list[bool]]  # which tokens of each row have a loss; never the first, which nothing predicts
    kept: list[int]  # the index of each among the rows that were given; the others have no token with a loss

    @property
    def tokens(self) -> int:
        """How many tokens have a loss."""
        return sum(map(sum, self.scored))

    def as_features(self) -> list[dict[str, Any]]:
        """What the Trainer's collator gets."""
        return [{"input_ids": row.ids, "scored": scored} for row, scored in zip(self.encoded, self.scored, strict=True)]


def greatest_length(model: PreTrainedModel, config: SupervisedConfig) -> int:
    """The most tokens of a row that the model is trained on."""
    return min(config.max_length, position_limit(model) or config.max_length)


def encode_supervised(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    config: SupervisedConfig,
    stops: Collection[int] = (),
) -> Rows:
    """Tokenize prompts and responses for training a model.

    stops: tokens that end the model's responses to chats. Raises ValueError for a token that the model has no row for,
    and where no row has a token with a loss.
    """
    limit = greatest_length(model, config)
    encoded = encode_exchanges(tokenizer, exchanges, stops)
    vocabulary = model.config.get_text_config().vocab_size
    check_ids(tokenizer, [row.ids for row in encoded], vocabulary, lambda i: describe(exchanges[i]))
    cut = [Encoded(row.ids[:limit], row.written[:limit], min(row.prompt, limit)) for row in encoded]
    scored = [[False, *(config.loss_on == "all" or written for written in row.written[1:])] for row in cut]
    kept = [index for index, row in enumerate(scored) if any(row)]
    if not kept:
        raise ValueError(
            f"none of {len(cut)} rows has a token of a response within {limit} tokens; raise max_length, or shorten "
            "the prompts."
        )
    return Rows([cut[index] for index in kept], [scored[index] for index in kept], kept)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    config: SupervisedConfig,
) -> float:
    """Train the model in place on (prompt, response) pairs. Returns the mean training loss in nats per token.

    The loss covers the response and its end token; with `loss_on="all"` also the prompt after its first token. The
    model never generates prompts, but training on them costs nothing extra and teaches the same words: on the embedded
    task the loss on responses falls faster with them (1.96 against 2.05 nats after 300 steps).

    Raises ValueError, before training, for a token that the model has no row for.
    """
    return fit(model, encode_supervised(model, tokenizer, pairs, config), config).loss


def fit(
    model: PreTrainedModel,
    rows: Rows,
    config: SupervisedConfig,
    job: Job | None = None,
    measure: Measure | None = None,
) -> Trained:
    """Train the model in place on tokenized rows."""
    features = grouped_by_length(rows.as_features(), config.batch_size, config.seed)
    with training_arguments(config, len(features), job, train_sampling_strategy="sequential") as arguments:
        trainer = Trainer(
            model,
            arguments,
            _collate,
            features,  # type: ignore[arg-type]
            optimizers=(_optimizer(model, config), None),
            compute_loss_func=_mean_over_tokens(rows, config.batch_size),
        )
        return train(trainer, job, measure)


def _optimizer(model: PreTrainedModel, config: SupervisedConfig) -> Optimizer | None:
    """None is the Trainer's own, AdamW."""
    if config.optimizer == "adamw":
        return None
    return muon_for(model, config.muon_learning_rate or MUON_LEARNING_RATE, config.learning_rate, config.weight_decay)


def _mean_over_tokens(rows: Rows, batch_size: int) -> Callable[..., Tensor]:
    """A loss in which every token has the same weight.

    Batches hold texts of similar length, to save padding. A mean over each batch's own tokens would give the tokens of
    short texts more weight, and teach the model to end too early.
    """
    targets = batch_size * rows.tokens / len(rows.scored)

    def loss(outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: int | None = None) -> Tensor:
        return token_losses(outputs.logits, labels).sum() / targets  # type: ignore[arg-type]

    return loss


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every token but the first, 0 where it is ignored. [B, T, V], [B, T] -> [B, T - 1]."""
    flat = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(len(labels), -1)


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    input_ids, mask = pad_right([row["input_ids"] for row in rows])
    scored, _ = pad_right([row["scored"] for row in rows])
    labels = input_ids.masked_fill(~scored.bool(), IGNORED)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}  # [B, T] each


@torch.inference_mode()
def losses_of_rows(model: PreTrainedModel, rows: Rows, batch_size: int) -> Tensor:
    """The summed loss of each of N rows, in nats, float32 [N]. Puts the model in eval mode."""
    model.eval()
    features = rows.as_features()
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    losses = torch.zeros(len(features))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in _collate([features[i] for i in indices]).items()}
        labels = batch.pop("labels")
        losses[indices] = token_losses(model(**batch).logits.float(), labels).sum(1).cpu()
    return losses


def some_rows(rows: Rows, count: int, seed: int) -> Rows:
    """At most `count` of the rows, drawn at random."""
    places = sorted(random.Random(seed).sample(range(len(rows.kept)), min(count, len(rows.kept))))
    return Rows(
        [rows.encoded[at] for at in places], [rows.scored[at] for at in places], [rows.kept[at] for at in places]
    )
