"""Direct alignment of a policy with preference pairs: the losses of DPO and IPO, and the log-probabilities they read.

Both start from the optimum of E[score] − β·KL(π ‖ π_ref), where the score difference of two responses to one prompt is
β times their margin h = log(π/π_ref)(chosen) − log(π/π_ref)(rejected). So pairs alone train the policy: no reward
model, no rollout. Owns no loop and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer

from textenv.models.logits import log_probs_at, read_logits, spread
from textenv.settings import check_types
from textenv.training.loop import Job, Measure, Trained, check_training, grouped_by_length, train, training_arguments

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings of learning from pairs."""

    loss: str = "dpo"  # dpo, ipo (log-ratios of whole responses, as in the paper) or ipo-mean (per token, as in TRL)
    label_smoothing: float = 0.0  # dpo: the share of choices taken to be flipped
    learning_rate: float = 1e-6  # peak, after a short warm-up; then cosine decay to zero
    epochs: float = 1.0  # passes over the training pairs
    batch_size: int = 32  # pairs per optimizer step
    gradient_accumulation: int = 1  # forwards per optimizer step, to save memory; divides batch_size
    weight_decay: float = 0.0  # decoupled, as in AdamW
    seed: int = 0  # of the order of the pairs and the choice of held-out pairs
    max_length: int = 512  # tokens of prompt and response; longer responses lose their end
    held_out_pairs: float = 0.1  # share of the prompts whose pairs are held out

    def __post_init__(self) -> None:
        check_types(self)
        check_training(self)
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), a share of choices, got {self.label_smoothing}.")
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError("label_smoothing is read by loss='dpo' alone; leave one of them out.")
        if not 0 < self.held_out_pairs < 1:
            raise ValueError(f"held_out_pairs must lie in (0, 1), a share of the prompts, got {self.held_out_pairs}.")


@dataclass(frozen=True)
class Preference:
    """One tokenized pair. The responses go on from the prompt, end tokens included."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B left-padded prompts with their responses: the B chosen ones, then the B rejected ones."""

    input_ids: Tensor  # int64 [2B, L]
    attention_mask: Tensor  # bool [2B, L], true = a token
    mask: Tensor  # bool [2B, R], true = a token of the response

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on `device`."""
        return PairBatch(self.input_ids.to(device), self.attention_mask.to(device), self.mask.to(device))


def pair_batch(pairs: Sequence[Preference]) -> PairBatch:
    """The tensors of B pairs. Empty columns hold token 0, which no model reads."""
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = _padded([pair.prompt for pair in pairs] * 2, "left")  # ids and mask [2B, P]
    answers = _padded(responses, "right")  # ids and mask [2B, R]
    return PairBatch(
        torch.cat([prompts[0], answers[0]], 1),  # [2B, L]
        torch.cat([prompts[1], answers[1]], 1),  # [2B, L]
        answers[1],
    )


def _padded(rows: Sequence[Tokens], side: str) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, 0, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True, 0, side)
    return ids, mask


def pair_log_probs(model: PreTrainedModel, batch: PairBatch, temperature: float = 1.0) -> Tensor:
    """Log π of each response: the sum over its tokens, at a temperature. Gradients flow. Returns float32 [2B].

    No logits are formed at prompts or padding, and a large vocabulary's not all at once (`textenv.models.logits`).
    """
    logits = read_logits(model, batch.input_ids, batch.attention_mask, batch.mask)
    tokens = batch.input_ids[:, -batch.mask.shape[1] :][batch.mask]
    return spread(log_probs_at(logits, tokens, temperature), batch.mask).sum(1)


@torch.no_grad()
def reference_log_probs(
    model: PreTrainedModel,
    pairs: Sequence[Preference],
    temperature: float = 1.0,
    batch_size: int = 16,
    tell: Callable[[int], Any] = lambda done: None,
) -> Tensor:
    """Log π_ref of all responses, computed once, so that training needs no reference in memory.

    tell: called with the number of pairs that are done. Returns float32 [N, 2] on the CPU: chosen, rejected.
    """
    rows = []
    for start in range(0, len(pairs), batch_size):
        batch = pair_batch(pairs[start : start + batch_size]).to(model.device)
        with training_precision(model):
            rows.append(pair_log_probs(model, batch, temperature).view(2, -1).T.cpu())  # [b, 2]
        tell(min(start + batch_size, len(pairs)))
    return torch.cat(rows)


def training_precision(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The precision in which the loop forwards a model: bfloat16 products on a GPU, else float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


def margins(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Margins h = log(π/π_ref)(chosen) − log(π/π_ref)(rejected), in nats. Both [2B], chosen first. Returns [B]."""
    chosen, rejected = (log_prob - reference_log_prob).chunk(2)
    return chosen - rejected


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(βh) of each pair (DPO, Rafailov et al. 2023). [B] to [B].

    The negative log-likelihood of the choices under Bradley-Terry, if β·log(π/π_ref) were the score.
    label_smoothing: the share ε of choices taken to be flipped, −(1−ε)·log σ(βh) − ε·log σ(−βh) (Mitchell 2023).
    """
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))² of each pair (IPO, Azar et al. 2024, eq. 17, whose τ is β). [B] to [B].

    DPO pushes the margin of a pair that everybody orders alike to infinity, whatever β; here it has a goal, 1/(2β).
    The margin is of whole responses, as in the paper. TRL divides each response's log-ratio by its length first: for
    that, pass margins of means (`mean_margins`).
    """
    return (margin - 1 / (2 * beta)).square()


def mean_margins(log_prob: Tensor, reference_log_prob: Tensor, lengths: Tensor) -> Tensor:
    """The margin of log-ratios per token, in nats a token. All [2B], chosen first. Returns [B]."""
    return margins(log_prob / lengths, reference_log_prob / lengths)


Loss = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

# Of log π and log π_ref of responses [2B], chosen first, their lengths [2B], β, and label smoothing. Returns [B].
LOSSES: dict[str, Loss] = {
    "dpo": lambda log_prob, reference, _, beta, smoothing: dpo_loss(margins(log_prob, reference), beta, smoothing),
    "ipo": lambda log_prob, reference, _, beta, __: ipo_loss(margins(log_prob, reference), beta),
    "ipo-mean": lambda log_prob, reference, lengths, beta, __: ipo_loss(
        mean_margins(log_prob, reference, lengths), beta
    ),
}


@dataclass(frozen=True)
class Pairs:
    """N tokenized pairs, and the reference's log-probabilities of their responses."""

    pairs: Sequence[Preference]
    reference: Tensor  # float32 [N, 2], chosen and rejected


class _PreferenceTrainer(Trainer):
    """Transformers' training loop with the loss of pairs."""

    settings: tuple[PreferenceConfig, float, float]  # with β and the temperature

    def compute_loss(self, model: Any, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # with dropout, the log-ratios to the reference would be noise
        config, beta, temperature = self.settings
        batch = PairBatch(inputs["input_ids"], inputs["attention_mask"], inputs["mask"])
        with training_precision(model):
            log_prob = pair_log_probs(model, batch, temperature)
        loss = pair_losses(config, beta, log_prob, inputs["reference"], batch.mask.sum(1)).mean()
        return (loss, {"log_prob": log_prob}) if return_outputs else loss


def pair_losses(config: PreferenceConfig, beta: float, log_prob: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The loss of each pair. Tensors [2B], chosen first. Returns [B]."""
    return LOSSES[config.loss](log_prob, reference, lengths, beta, config.label_smoothing)


def fit(
    model: PreTrainedModel,
    data: Pairs,
    config: PreferenceConfig,
    objective: tuple[float, float],
    job: Job | None = None,
    measure: Measure | None = None,
) -> Trained:
    """Train the model in place. objective: β, and the temperature of both distributions. job, measure: see loop.py."""
    rows = [
        {"input_ids": [*pair.prompt, *max(pair.chosen, pair.rejected, key=len)], "pair": pair, "reference": base}
        for pair, base in zip(data.pairs, data.reference, strict=True)
    ]
    rows = grouped_by_length(rows, config.batch_size, config.seed)
    with training_arguments(config, len(rows), job, train_sampling_strategy="sequential") as arguments:
        trainer = _PreferenceTrainer(model, arguments, _collate, rows)  # type: ignore[arg-type]
        trainer.settings = config, *objective
        trained = train(trainer, job, measure)
    model.eval()
    return trained


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = pair_batch([row["pair"] for row in rows])
    reference = torch.stack([row["reference"] for row in rows]).T.flatten()  # [2B], chosen first
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "mask": batch.mask,
        "reference": reference,
    }


def measure_pairs(
    model: PreTrainedModel, data: Pairs, config: PreferenceConfig, objective: tuple[float, float]
) -> dict[str, list[float]]:
    """Of each pair: its loss, whether the margin is above 0 (½ at 0), the margin, and both log-ratios, in nats."""
    beta, temperature = objective
    size = max(1, config.batch_size // config.gradient_accumulation)
    log_prob = reference_log_probs(model, data.pairs, temperature, size).T.flatten()  # [2N]
    base = data.reference.T.flatten()
    lengths = torch.tensor([len(p.chosen) for p in data.pairs] + [len(p.rejected) for p in data.pairs])
    margin, ratio = margins(log_prob, base), log_prob - base
    numbers = {
        "loss": pair_losses(config, beta, log_prob, base, lengths),
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0),
        "margin": margin,
        "chosen_log_ratio": ratio.chunk(2)[0],
        "rejected_log_ratio": ratio.chunk(2)[1],
    }
    return {name: values.tolist() for name, values in numbers.items()}
