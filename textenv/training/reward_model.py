"""Stage 2 of RLHF: a reward model from preference pairs or from labeled texts, or an ensemble of them.

Owns the losses and the command. The loop is Transformers' Trainer (loop.py), and the result a standard
sequence-classification folder; of an ensemble of K models, K such folders in one. Scores are taken at the last real
token according to the mask, so the pad token may equal the end token.

Members of an ensemble agree by how much they share. Models have the same base and data, and differ in the seed of the
head and the order of the rows (Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization"). Heads share
the body too, and a linear head has one best value on it; so each is trained on a bootstrap sample of its own, and even
then they disagree little and share most errors. Members with bases of their own differ most (Eisenstein et al. 2023,
"Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking").
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from textenv.models.language_model import position_limit
from textenv.models.loading import (
    load_config,
    load_model,
    load_stop_token_ids,
    load_tokenizer,
    load_weights,
    quietly,
    refuse_random,
    switch_off_dropout,
    without_report,
)
from textenv.rewards.reward_model import last_token_scores, member_name
from textenv.settings import check_types
from textenv.training.calibration import calibrate
from textenv.training.card import RECORD
from textenv.training.data import Row, read_rows
from textenv.training.loop import (
    LOOP,
    Job,
    LoopConfig,
    Measure,
    Trained,
    check_training,
    pad_right,
    prompt_key,
    split_rows,
    started_with,
    train,
    training_arguments,
)
from textenv.training.preferences import Examples, Pairs, Tokens, encode_rows
from textenv.training.reward_card import RewardReport, report_of, write_results

MEASURED = 512  # held-out rows at most that are read for the curve; the numbers at the end are of all


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of reward-model training."""

    learning_rate: float = 1e-4  # peak, after a short warm-up; then cosine decay to zero
    epochs: float = 2.0  # passes over the training rows
    batch_size: int = 32  # rows (pairs or labeled texts) per optimizer step
    gradient_accumulation: int = 1  # forwards per optimizer step, to save memory; divides batch_size
    weight_decay: float = 0.01  # decoupled, as in AdamW
    seed: int = 0  # of the new head, the order of rows and the choice of held-out rows
    max_length: int = 512  # tokens per sequence, at most the model's positions; longer sequences lose their start
    held_out: float = 0.1  # share of the rows held out for the reported accuracy, by whole prompts
    centering: float = 0.01  # weight of the mean squared score of pairs, which fixes their otherwise arbitrary offset
    heads: int = 1  # K > 1: an ensemble of heads on one body, each trained on a bootstrap sample of its own
    models: int = 1  # K > 1: an ensemble of models, trained one after another with seeds seed, seed + 1, ...

    def __post_init__(self) -> None:
        check_types(self)
        check_training(self)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), a share of the rows, got {self.held_out}.")
        if self.centering < 0:
            raise ValueError(f"centering must not be negative, got {self.centering}.")
        if self.heads < 1 or self.models < 1 or (self.heads > 1 and self.models > 1):
            raise ValueError(
                f"heads and models must be 1 or more, and one of them 1, got {self.heads} and {self.models}: an "
                "ensemble is of models, or of the heads of one."
            )
        if self.seed + self.models > 2**32:
            raise ValueError(f"seed + models must be at most 2^32, got {self.seed} + {self.models}; lower seed.")


DEFAULT = RewardConfig()


def load_base(base: str | Path, seed: int, heads: int = 1) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal or classification model from a folder or hub name, with new scalar heads, and its tokenizer."""
    base = str(base)
    config = load_config(base)
    tokenizer = load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {base} has no end token; set eos_token and save it again.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token  # masks tell padding, so any token that the model has will do
    labels = ["score"] if heads == 1 else [member_name(index) for index in range(heads)]
    config.id2label, config.label2id = dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}
    config.problem_type = "regression" if heads > 1 else config.problem_type  # each output is a score as it is
    config.pad_token_id = tokenizer.pad_token_id
    switch_off_dropout(config)
    torch.manual_seed(seed)  # loading initializes the new heads
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


class _Scorer(nn.Module):
    """The model's scores as a module's forward, so that the Trainer can wrap it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return last_token_scores(self.model, input_ids, attention_mask)  # [B, K]


def preference_loss(logits: Tensor, targets: Tensor, margins: Tensor, weights: Tensor | None = None) -> Tensor:
    """Logistic loss of log-odds less a margin: for pairs −log σ(r_chosen − r_rejected − m).

    Bradley and Terry 1952; with margins Touvron et al. 2023, "Llama 2", equation 2. The mean over rows and heads.
    logits: [B, K]; targets: [B], 1 or 0; margins: [B]; weights: [B, K], of each row for each head.
    """
    goals = targets[:, None].expand_as(logits)  # [B, K]
    return F.binary_cross_entropy_with_logits(logits - margins[:, None], goals, weights)


def bootstrap_counts(rows: int, heads: int, seed: int) -> Tensor:
    """How often each row is in each head's bootstrap sample of as many rows, float32 [rows, heads]."""
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randint(rows, (rows,), generator=generator) for _ in range(heads)]
    return torch.stack([sample.bincount(minlength=rows) for sample in samples], 1).float()


class _RewardTrainer(Trainer):
    """Transformers' training loop with the loss of a reward model."""

    examples: Examples
    centering: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(inputs["input_ids"], inputs["attention_mask"])  # [B or 2B, K]
        logits = self.examples.logits(scores)
        loss = preference_loss(logits, inputs["targets"], inputs["margins"], inputs.get("weights"))
        if isinstance(self.examples, Pairs):
            loss = loss + self.centering * scores.square().mean()
        return (loss, {"scores": scores}) if return_outputs else loss


def fit(
    model: PreTrainedModel,
    examples: Examples,
    config: RewardConfig,
    optimizer: Optimizer | None = None,
    job: Job | None = None,
    measure: Measure | None = None,
) -> Trained:
    """Train the model in place, with the Bradley-Terry loss on pairs or the logistic loss on labels.

    optimizer: replaces AdamW, over the model's parameters; the schedule scales its learning rates. job and measure: see
    `train`. A model with K heads trains each on a bootstrap sample of its own.
    """
    heads = model.config.num_labels or 1
    weights = bootstrap_counts(len(examples.rows), heads, config.seed) if heads > 1 else None

    def collate(indices: list[int]) -> dict[str, Tensor]:
        batch: Examples = replace(examples, rows=[examples.rows[index] for index in indices])  # type: ignore[arg-type]
        input_ids, mask = pad_right(batch.sequences())  # [B or 2B, T]
        tensors = {"input_ids": input_ids, "attention_mask": mask}
        tensors |= {"targets": batch.targets(), "margins": batch.margins()}
        return tensors if weights is None else tensors | {"weights": weights[indices]}

    with training_arguments(config, len(examples.rows), job) as arguments:
        trainer = _RewardTrainer(
            _Scorer(model),
            arguments,
            collate,
            list(range(len(examples.rows))),  # type: ignore[arg-type]
            optimizers=(optimizer, None),
        )
        trainer.examples, trainer.centering = examples, config.centering
        return train(trainer, job, measure)


@torch.inference_mode()
def head_scores(model: PreTrainedModel, sequences: Sequence[Tokens], batch_size: int = 128) -> Tensor:
    """The score of each of N tokenized sequences by each head, float32 [N, K]. Puts the model in eval mode."""
    model.eval()
    batches = [pad_right(sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)]
    scores = [last_token_scores(model, ids.to(model.device), mask.to(model.device)) for ids, mask in batches]
    return torch.cat(scores).float().cpu()


def score_tokens(model: PreTrainedModel, sequences: Sequence[Tokens], batch_size: int = 128) -> Tensor:
    """The score of each of N tokenized sequences, of several heads their mean, float32 [N]. Puts it in eval mode."""
    return head_scores(model, sequences, batch_size).mean(1)


def train_reward_model(
    base: str | Path,
    data: str | Path,
    output: str | Path,
    config: RewardConfig = DEFAULT,
    loop: LoopConfig = LOOP,
) -> RewardReport:
    """Train a reward model or an ensemble, save it with a card, and report its numbers on held-out rows.

    Args:
        base: Folder or hub name of a decoder-only causal or sequence-classification model.
        data: JSONL of {prompt?, chosen, rejected, margin?} or of {prompt?, text, label} with label 0 or 1.
        output: New or empty folder for the reward model and its tokenizer; for K models, for member-0, member-1, ...
        config: Settings of the training.
        loop: How it is run; a stopped training may go on.

    Raises ValueError, before training, for data or a base that cannot be read or an output that cannot be written.
    """
    output, data, rows = Path(output), Path(data), read_rows(data)
    parts = split_rows(rows, config.held_out, config.seed)
    job = Job(output, started_with(data, base, config), loop)
    job.check()
    model, tokenizer = load_base(base, config.seed, config.heads)
    limit = min(config.max_length, position_limit(model) or config.max_length)
    vocabulary = model.config.get_text_config().vocab_size
    stops = load_stop_token_ids(str(base), tokenizer)
    training, held_out = (encode_rows(tokenizer, part, limit, vocabulary, stops) for part in parts)
    work = _Work(config, training, held_out, job)
    with job.held():
        if config.models == 1:
            histories, folders = [work.train(model, config, job).history], [output]
            save(model, tokenizer, output)
        else:
            del model  # each member is loaded by itself
            histories = [work.train_member(index, base, tokenizer) for index in range(config.models)]
            folders = [output / member_name(index) for index in range(config.models)]
        scores = [_member_scores(folders, config, part.sequences()) for part in (training, held_out)]
        report = report_of(training, held_out, scores, [prompt_key(row) for row in parts[1]])
        report = replace(report, chats=isinstance(rows[0].get("prompt"), list))
        write_results(report, str(base), data, job, histories)
        job.finish()
    print(f"{report.line()}; saved to {output}, whose README.md has the numbers")
    return report


@dataclass(frozen=True)
class _Work:
    """What the trainings of an ensemble share."""

    config: RewardConfig
    training: Examples
    held_out: Examples
    job: Job

    def train(self, model: PreTrainedModel, config: RewardConfig, job: Job) -> Trained:
        """Train a model in place, with numbers on some of the held-out rows."""
        every = -(-len(self.held_out.rows) // MEASURED)
        some: Examples = replace(self.held_out, rows=self.held_out.rows[::every])  # type: ignore[arg-type]

        def measure() -> dict[str, float]:
            numbers = calibrate(some.logits(score_tokens(model, some.sequences(), _forward(config))), some.targets())
            return {"held_out_accuracy": numbers.accuracy, "held_out_loss": numbers.log_loss}

        return fit(model, self.training, config, job=job, measure=measure)

    def train_member(self, index: int, base: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Train one model of several and save it, unless that is done. Returns the history of its training."""
        name = member_name(index)
        folder, unfinished = self.job.output / name, self.job.work / "unfinished"
        if os.path.isdir(folder):  # of a training that was stopped later
            return json.loads((folder / RECORD).read_text(encoding="utf-8"))["history"]
        print(f"{name}, of {self.config.models}:", flush=True)
        config = replace(self.config, seed=self.config.seed + index, models=1)
        model, _ = load_base(base, config.seed)
        trained = self.train(model, config, replace(self.job, output=self.job.work / name))
        shutil.rmtree(unfinished, ignore_errors=True)
        save(model, tokenizer, unfinished)
        record = {"seed": config.seed, "history": trained.history}
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(folder)  # a member is there as a whole, or not at all
        shutil.rmtree(self.job.work / name)  # its checkpoints
        return trained.history


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer."""
    with quietly():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forward(config: RewardConfig) -> int:
    """Rows in a forward of the training, for which there is memory."""
    return config.batch_size // config.gradient_accumulation


def _member_scores(folders: Sequence[Path], config: RewardConfig, sequences: Sequence[Tokens]) -> Tensor:
    """The scores of all members, one model in memory at a time. Float32 [N, K]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def scores(folder: Path) -> Tensor:
        model = load_model(AutoModelForSequenceClassification, str(folder), device, torch.float32)
        return head_scores(model, sequences, _forward(config))

    return torch.cat([scores(folder) for folder in folders], 1)
