"""What a reward model is worth on held-out rows: its numbers, and the card that shows them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from textenv.training.calibration import RELIABILITY, Calibration, calibrate, draw_reliability, right_choices
from textenv.training.card import CURVE, Card, Number, draw_curve, table, write_card
from textenv.training.data import Row
from textenv.training.loop import Job, file_hash
from textenv.training.preferences import Examples, Pairs


@dataclass(frozen=True)
class Agreement:
    """How far the K members of an ensemble agree on the held-out rows."""

    members: tuple[Calibration, ...]
    disagreement: float  # std over the members of a text's score, without a correction, mean over the texts
    disagreement_of_choices: float  # the same of a row's log-odds; of labeled texts these are the scores
    accuracy_agreed: float  # of the ensemble, on the half of the rows with the lower std of the log-odds
    accuracy_disputed: float  # on the other half


@dataclass(frozen=True)
class RewardReport:
    """The results of training a reward model or an ensemble; of an ensemble, those of the members' mean score."""

    kind: str  # "pairs" or "labeled"
    train_rows: int
    held_out_rows: int
    calibration: Calibration  # on the held-out rows
    agreement: Agreement | None  # None of one model with one head
    score_mean: float  # over the training texts
    score_deviation: float  # over the training texts
    chats: bool = False  # whether the rows are chats

    @property
    def held_out_accuracy(self) -> float:
        """Share of held-out rows classified correctly."""
        return self.calibration.accuracy

    def line(self) -> str:
        """The numbers in a line."""
        numbers = self.calibration
        error = "" if numbers.accuracy_error is None else f" ± {numbers.accuracy_error:.3f}"
        several = "" if self.agreement is None else f", disagreement {self.agreement.disagreement:.3f}"
        return (
            f"held-out accuracy {numbers.accuracy:.3f}{error} on {numbers.rows} rows, log loss {numbers.log_loss:.3f}, "
            f"calibration error {numbers.calibration_error:.3f}{several}"
        )


def report_of(
    training: Examples, held_out: Examples, scores: Sequence[Tensor], clusters: Sequence[Any] = ()
) -> RewardReport:
    """The numbers of members' scores [N, K] of the texts of the training rows and of the held-out rows.

    clusters: the prompt of each held-out row, see `mean_and_error`.
    """
    logits, targets = held_out.logits(scores[1]), held_out.targets()  # [N, K], [N]
    mean = scores[0].mean(1)
    return RewardReport(
        kind="pairs" if isinstance(held_out, Pairs) else "labeled",
        train_rows=len(training.rows),
        held_out_rows=len(held_out.rows),
        calibration=calibrate(logits.mean(1), targets, clusters),
        agreement=agreement_of(scores[1], logits, targets, clusters) if logits.shape[1] > 1 else None,
        score_mean=mean.mean().item(),
        score_deviation=mean.std(correction=0).item(),
    )


def agreement_of(scores: Tensor, logits: Tensor, targets: Tensor, clusters: Sequence[Any]) -> Agreement:
    """How far members agree. scores: of the texts, [M, K]; logits: of the rows, [N, K]; targets: [N]."""
    spread = logits.std(1, correction=0)  # [N]
    right = right_choices(logits.mean(1), targets)[spread.argsort()]
    half = max(1, len(right) // 2)
    return Agreement(
        members=tuple(calibrate(column, targets, clusters) for column in logits.T),
        disagreement=scores.std(1, correction=0).mean().item(),
        disagreement_of_choices=spread.mean().item(),
        accuracy_agreed=right[:half].mean().item(),
        accuracy_disputed=right[-half:].mean().item(),
    )


def write_results(report: RewardReport, base: str, data: Path, job: Job, histories: Sequence[Sequence[Row]]) -> None:
    """Write the card, training.json and the pictures into the output folder of the job."""
    output, members = job.output, report.agreement.members if report.agreement else ()
    draw_reliability(output / RELIABILITY, report.calibration)
    if len(histories) == 1:
        lines, drawn = {"loss": "training", "held_out_loss": "held out"}, list(histories[0])
    else:
        lines = {f"held out, member {index}": f"held out, member {index}" for index in range(len(histories))}
        drawn = [
            {"step": row["step"], f"held out, member {index}": row["held_out_loss"]}
            for index, history in enumerate(histories)
            for row in history
            if "held_out_loss" in row
        ]
    draw_curve(output / CURVE, drawn, lines, "log loss, nats per row")
    sections = [("Calibration", _calibration(report.calibration)), ("Training", f"![loss over steps]({CURVE})")]
    if members:
        sections.insert(1, ("Members", _members(report)))
    card = Card(
        title=f"Reward model: {output.name}",
        about=_about(report, len(histories)),
        base=base,
        data={
            "file": data.name,
            "SHA-256": file_hash(data),
            "training rows": report.train_rows,
            "held-out rows": report.held_out_rows,
        },
        settings=job.started_with["settings"],
        numbers=numbers_of(report),
        sections=sections,
        use=(
            f"python -m agents train --env.reference {shlex.quote(base)} "
            f"--env.reward {shlex.quote(str(output))} --env.prompts PROMPTS.jsonl"
            + (" --env.chat" if report.chats else "")
        ),
        record={"report": asdict(report), "histories": [list(history) for history in histories]},
    )
    write_card(output, card)


def numbers_of(report: RewardReport) -> list[Number]:
    """The numbers of the card."""
    found, choice = report.calibration, "pairs ordered" if report.kind == "pairs" else "texts classified"
    numbers = [
        Number("accuracy", found.accuracy, found.accuracy_error, f"held-out {choice} as the data has them"),
        Number("log_loss", found.log_loss, found.log_loss_error, "log loss, nats; 0.693 knows nothing"),
        Number("calibration_error", found.calibration_error, None, "expected calibration error, 10 bins"),
        Number("expected_error", found.expected_error, None, "what a calibrated model would have there, about"),
        Number("score_mean", report.score_mean, None, "mean score of the training texts"),
        Number("score_deviation", report.score_deviation, None, "its standard deviation"),
    ]
    if report.agreement is None:
        return numbers
    several = report.agreement
    return [
        *numbers,
        Number("disagreement", several.disagreement, None, "std of a text's score over the members, mean"),
        Number(
            "accuracy_agreed", several.accuracy_agreed, None, "accuracy where the members agree most, half the rows"
        ),
        Number("accuracy_disputed", several.accuracy_disputed, None, "accuracy where they agree least, the other half"),
    ]


def _about(report: RewardReport, models: int) -> str:
    what = "preference pairs" if report.kind == "pairs" else "labeled texts"
    one = f"One score for a prompt and its whole response, trained on {what}."
    if report.agreement is None:
        return one
    members = len(report.agreement.members)
    form = f"{members} models, in `member-0` and on" if models > 1 else f"{members} heads on one body"
    return (
        f"An ensemble: {form}. {one} As a reward it is the members' mean, their least (`reward_ensemble=min`), or mean "
        "− κ · std (`reward_ensemble=κ`). The numbers are of the mean."
    )


def _calibration(found: Calibration) -> str:
    rows = [
        (
            f"{each.low:.2f} to {each.high:.2f}",
            str(each.rows),
            "" if each.confidence is None else f"{each.confidence:.3f}",
            "" if each.accuracy is None else f"{each.accuracy:.3f}",
        )
        for each in found.bins
    ]
    return "\n\n".join(
        [
            "The confidence of a choice is σ(|log-odds|). Of a calibrated model, choices of confidence c are right in "
            "a share c of the cases; bars are standard errors of such a model.",
            f"![reliability]({RELIABILITY})",
            table(("confidence", "rows", "mean confidence", "accuracy"), rows),
        ]
    )


def _members(report: RewardReport) -> str:
    assert report.agreement is not None
    rows = [
        (str(index), f"{found.accuracy:.4f}", f"{found.log_loss:.4f}", f"{found.calibration_error:.4f}")
        for index, found in enumerate(report.agreement.members)
    ]
    return table(("member", "accuracy", "log loss", "calibration error"), rows)
