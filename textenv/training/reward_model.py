"""Stage 2 of RLHF: a reward model from preference pairs or from labeled texts.

Owns the JSONL format, the two losses and the command. The loop is Transformers' Trainer, and the result is a standard
sequence-classification folder. Scores are taken at the last real token according to the mask, so the pad token may
equal the end token.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from textenv.json_lines import read_json_lines
from textenv.models.encoding import check_ids, encode, encode_pairs, end_with
from textenv.models.loading import (
    load_config,
    load_tokenizer,
    load_weights,
    refuse_random,
    switch_off_dropout,
    without_report,
)
from textenv.rewards.reward_model import last_token_scores
from textenv.settings import check_new_folder, check_types
from textenv.training.supervised import STOCK_ARGUMENTS, check_training, pad_right

Tokens = Sequence[int]
Row = dict[str, Any]  # a line of the JSONL


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of reward-model training."""

    learning_rate: float = 1e-4  # peak, after a short warm-up; then cosine decay to zero
    epochs: float = 2.0  # passes over the training rows
    batch_size: int = 32  # rows (pairs or labeled texts) per optimizer step
    weight_decay: float = 0.01  # decoupled, as in AdamW
    seed: int = 0  # of the new head, the order of rows and the choice of held-out rows
    max_length: int = 512  # tokens per sequence, at most the model's positions; longer sequences lose their start
    held_out: float = 0.1  # share of the rows held out for the reported accuracy, by whole prompts
    centering: float = 0.01  # weight of the mean squared score of pairs, which fixes their otherwise arbitrary offset

    def __post_init__(self) -> None:
        check_types(self)
        check_training(self)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), a share of the rows, got {self.held_out}.")
        if self.centering < 0:
            raise ValueError(f"centering must not be negative, got {self.centering}.")


DEFAULT = RewardConfig()


@dataclass(frozen=True)
class Pairs:
    """Tokenized preferences: in each row, the first sequence is preferred to the second."""

    rows: list[tuple[Tokens, Tokens]]

    def sequences(self) -> list[Tokens]:
        """The B chosen sequences, then the B rejected ones."""
        return [chosen for chosen, _ in self.rows] + [rejected for _, rejected in self.rows]

    def targets(self) -> Tensor:
        """Targets of the logits, all 1. Returns [B]."""
        return torch.ones(len(self.rows))

    def logits(self, scores: Tensor) -> Tensor:
        """Log-odds of the preferences under Bradley-Terry. scores: [2B], chosen first. Returns [B]."""
        chosen, rejected = scores.chunk(2)
        return chosen - rejected


@dataclass(frozen=True)
class Labeled:
    """Tokenized texts with label 0 (bad) or 1 (good)."""

    rows: list[tuple[Tokens, int]]

    def sequences(self) -> list[Tokens]:
        """The B tokenized texts."""
        return [tokens for tokens, _ in self.rows]

    def targets(self) -> Tensor:
        """Targets of the logits, 0 or 1. Returns [B]."""
        return torch.tensor([float(label) for _, label in self.rows])

    def logits(self, scores: Tensor) -> Tensor:
        """Log-odds of label 1. scores: [B]. Returns [B]."""
        return scores


Examples = Pairs | Labeled


def load_base(base: str | Path, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal or classification model from a folder or hub name, with a scalar head, and its tokenizer."""
    base = str(base)
    config = load_config(base)
    tokenizer = load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {base} has no end token; set eos_token and save it again.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token  # masks tell padding, so any token that the model has will do
    config.id2label, config.label2id = {0: "score"}, {"score": 0}  # one label
    config.pad_token_id = tokenizer.pad_token_id
    switch_off_dropout(config)
    torch.manual_seed(seed)  # loading initializes the new head
    with without_report():
        model, report = load_weights(
            AutoModelForSequenceClassification, base, config, torch.float32, ignore_mismatched_sizes=True
        )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{base} is a {type(model).__name__}, which has no linear head named 'score' over a decoder. "
            "Use a decoder-only base, such as GPT-2 or Llama."
        )
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    refuse_random(base, model, {name for name in new if not name.startswith("score.")})
    return model, tokenizer


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL of {prompt?, chosen, rejected} or of {prompt?, text, label}; all rows must be of one kind."""
    path, rows = Path(path), []
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        raise ValueError(f"no training data at {str(path)!r}; give a .jsonl file of lines such as {_EXAMPLE}.")
    for place, row in read_json_lines(path, _EXAMPLE):
        rows.append(_checked_row(row, place))
        if _kind(rows[-1]) != _kind(rows[0]):
            raise ValueError(f"{place}: the file mixes rows of pairs and rows with labels. Split the file.")
    if not rows:
        raise ValueError(f"{path} has no rows. Write one JSON object per line, such as {_EXAMPLE}.")
    return rows


_FIELDS = {"pairs": ("chosen", "rejected"), "labeled": ("text", "label")}
_EXAMPLE = '{"prompt": "...", "chosen": "...", "rejected": "..."} or {"text": "...", "label": 1}'


def _kind(row: Mapping[str, Any]) -> str | None:
    return next((kind for kind, fields in _FIELDS.items() if all(name in row for name in fields)), None)


def _checked_row(row: Any, where: str) -> Row:
    kind = _kind(row) if isinstance(row, dict) else None
    if kind is None:
        got = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: needs chosen and rejected, or text and label; got {got}. Write {_EXAMPLE}.")
    for name in {"prompt", "chosen", "rejected", "text"} & row.keys():
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} must be a string, got {row[name]!r}. Put it in quotes.")
    if kind == "labeled" and (isinstance(row["label"], bool) or row["label"] not in (0, 1)):
        raise ValueError(f"{where}: label must be 0 or 1, got {row['label']!r}. Map your labels to 0 (bad), 1 (good).")
    return row


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, vocabulary: int) -> Examples:
    """Tokenize rows: prompt, space and text, end token; at most the last `max_length` tokens.

    Raises ValueError for a token that a model of `vocabulary` ids has no row for.
    """
    names = [name for name in _FIELDS[_kind(rows[0]) or ""] if name != "label"]
    columns = [
        [end_with(tokenizer, ids)[-max_length:] for ids in _encode_column(tokenizer, rows, name)] for name in names
    ]
    for name, column in zip(names, columns, strict=True):
        check_ids(tokenizer, column, vocabulary, lambda i, name=name: f"the {name} text {rows[i][name][:60]!r}")
    if len(columns) == 2:
        return Pairs(list(zip(*columns, strict=True)))
    return Labeled([(ids, int(row["label"])) for ids, row in zip(columns[0], rows, strict=True)])


def _encode_column(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], name: str) -> list[list[int]]:
    """The tokens of one text of each row, after its prompt if it has one."""
    column = encode(tokenizer, [row[name] for row in rows])
    with_prompt = [index for index, row in enumerate(rows) if "prompt" in row]
    pairs = encode_pairs(tokenizer, [(rows[index]["prompt"], rows[index][name]) for index in with_prompt])
    for index, (prompt_ids, response_ids) in zip(with_prompt, pairs, strict=True):
        column[index] = [*prompt_ids, *response_ids]
    return column


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into training rows and held-out rows. Rows with the same prompt stay together, so no prompt leaks."""
    keys = [row.get("prompt") or json.dumps(row, sort_keys=True) for row in rows]
    distinct = sorted(set(keys))
    held_out = set(random.Random(seed).sample(distinct, max(1, round(share * len(distinct)))))
    if len(held_out) == len(distinct):
        raise ValueError(f"{len(rows)} rows of {len(distinct)} prompts leave no training rows. Give more rows.")
    paired = list(zip(keys, rows, strict=True))
    return [row for key, row in paired if key not in held_out], [row for key, row in paired if key in held_out]


class _Scorer(nn.Module):
    """The model's scores as a module's forward, so that the Trainer can wrap it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return last_token_scores(self.model, input_ids, attention_mask).squeeze(-1)  # [B]


class _RewardTrainer(Trainer):
    """Transformers' training loop with the loss of a reward model."""

    examples: Examples
    centering: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(inputs["input_ids"], inputs["attention_mask"])
        loss = F.binary_cross_entropy_with_logits(self.examples.logits(scores), inputs["targets"])
        if isinstance(self.examples, Pairs):
            loss = loss + self.centering * scores.square().mean()
        return (loss, {"scores": scores}) if return_outputs else loss


def fit(model: PreTrainedModel, examples: Examples, config: RewardConfig, optimizer: Optimizer | None = None) -> None:
    """Train the model in place, with the Bradley-Terry loss on pairs or the logistic loss on labels.

    optimizer: replaces AdamW, over the model's parameters; the schedule scales its learning rates.
    """

    def collate(rows: list) -> dict[str, Tensor]:
        batch = replace(examples, rows=rows)
        input_ids, mask = pad_right(batch.sequences())  # [B or 2B, T]
        return {"input_ids": input_ids, "attention_mask": mask, "targets": batch.targets()}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            weight_decay=config.weight_decay,
            seed=config.seed,
            **STOCK_ARGUMENTS,
        )
        trainer = _RewardTrainer(
            _Scorer(model),
            arguments,
            collate,
            examples.rows,  # type: ignore[arg-type]
            optimizers=(optimizer, None),
        )
        trainer.examples, trainer.centering = examples, config.centering
        trainer.train()


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, sequences: Sequence[Tokens], batch_size: int = 128) -> Tensor:
    """The score of each of N tokenized sequences, float32 [N]. Puts the model in eval mode."""
    model.eval()
    batches = [pad_right(sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)]
    scores = [last_token_scores(model, ids.to(model.device), mask.to(model.device)) for ids, mask in batches]
    return torch.cat(scores).squeeze(-1).float().cpu()


def accuracy(model: PreTrainedModel, examples: Examples) -> float:
    """The share of rows that the model classifies correctly. A logit of exactly 0 counts half."""
    logits = examples.logits(score_tokens(model, examples.sequences()))
    correct = torch.where(logits == 0, 0.5, ((logits > 0) == (examples.targets() > 0.5)).float())
    return correct.mean().item()


@dataclass(frozen=True)
class RewardReport:
    """The results of training a reward model."""

    kind: str  # "pairs" or "labeled"
    train_rows: int
    held_out_rows: int
    held_out_accuracy: float  # share of held-out rows classified correctly
    score_mean: float  # over the training texts
    score_deviation: float  # over the training texts


def train_reward_model(
    base: str | Path, data: str | Path, output: str | Path, config: RewardConfig = DEFAULT
) -> RewardReport:
    """Train a reward model, save it as a standard folder and report its accuracy on held-out rows.

    Args:
        base: Folder or hub name of a decoder-only causal or sequence-classification model.
        data: JSONL of {prompt?, chosen, rejected} or of {prompt?, text, label} with label 0 or 1.
        output: New or empty folder for the reward model and its tokenizer.
        config: Settings of the training.

    Raises ValueError, before training, for data or a base that cannot be read or an output that cannot be written.
    """
    rows = read_rows(data)
    parts = split_rows(rows, config.held_out, config.seed)
    check_new_folder(Path(output), "output folder")
    model, tokenizer = load_base(base, config.seed)
    limit = min(config.max_length, getattr(model.config, "max_position_embeddings", config.max_length))
    vocabulary = model.config.get_text_config().vocab_size
    train, held_out = (encode_rows(tokenizer, part, limit, vocabulary) for part in parts)
    fit(model, train, config)
    scores = score_tokens(model, train.sequences())
    report = RewardReport(
        kind=_kind(rows[0]) or "",
        train_rows=len(train.rows),
        held_out_rows=len(held_out.rows),
        held_out_accuracy=accuracy(model, held_out),
        score_mean=scores.mean().item(),
        score_deviation=scores.std().item(),
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"held-out accuracy {report.held_out_accuracy:.3f} on {report.held_out_rows} rows; saved to {output}")
    return report


if __name__ == "__main__":
    import tyro

    tyro.cli(train_reward_model)
