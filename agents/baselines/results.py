"""What a training without a rollout leaves behind: the model with its card, samples, curves, and a run's summary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from matplotlib import pyplot
from transformers import PreTrainedModel

from agents.baselines.frontier import FINGERPRINTS
from agents.baselines.setting import SettingConfig
from agents.config import id_of
from agents.reporting.plots import BLUE, GRAY, GREEN, ORANGE, RED, Line, Panel
from agents.reporting.record_file import HELD_OUT, RecordFile
from agents.reporting.report import machine
from agents.reporting.viewer import FILE, Outline, describe_panel, read_report, write_outline, write_page
from agents.text.evaluation import Evaluation
from agents.text.policy import export_policy
from agents.text.samples import make_summary, write_samples
from textenv.task import Task
from textenv.training.card import Card, Number, mean_and_error, write_card
from textenv.training.files import write_json, write_text
from textenv.training.loop import Trained

PAIRS, CURVES, METRICS = "pairs.jsonl", "curves.png", "metrics.jsonl"

MEANINGS = {
    "loss": "loss on held-out pairs",
    "accuracy": "held-out pairs whose chosen response gained more probability than the rejected one, share",
    "margin": "margin h of held-out pairs, nats",
    "chosen_log_ratio": "log(π/π_ref) of held-out chosen responses, nats",
    "rejected_log_ratio": "log(π/π_ref) of held-out rejected responses, nats",
}


STEP = "optimizer step"
ASIDE = ("held_out", "gold")  # settings of the measurement
PLACES = {"reward": "MODULE:FUNCTION", "prompts": "FILE.jsonl"}  # parts of an environment
# Lines of the training; `evaluated` is measured before the first step too.
PANELS = (
    Panel(
        title="Loss",
        unit="loss",
        lines=(Line("loss", "training", GRAY), Line("held_out_loss", "held-out pairs", BLUE, "held_out_loss")),
    ),
    Panel(
        title="Accuracy",
        unit="share of held-out pairs",
        lines=(Line("held_out_accuracy", "accuracy", GREEN, "held_out_accuracy"),),
        shows=(0.5, 1.0),
    ),
    Panel(
        title="log(π/π_ref)",
        unit="nats, held-out pairs",
        lines=(
            Line("held_out_margin", "margin", BLUE, "held_out_margin"),
            Line("held_out_chosen_log_ratio", "chosen", ORANGE, "held_out_chosen_log_ratio"),
            Line("held_out_rejected_log_ratio", "rejected", RED, "held_out_rejected_log_ratio"),
        ),
        shows=(0.0,),
    ),
)


@dataclass(frozen=True)
class Measured:
    """A policy on held-out prompts."""

    evaluation: Evaluation
    records: Sequence[Mapping[str, Any]]  # of the first responses, token by token


@dataclass(frozen=True)
class Results:
    """What came of a training from pairs."""

    task: Task
    settings: Mapping[str, Any]
    data: Mapping[str, Any]  # what is known of the pairs
    fingerprints: Mapping[str, str]  # of models and prompts
    trained: Trained
    held_out: Mapping[str, list[float]]  # numbers of each held-out pair, see `measure_pairs`
    clusters: Sequence[str]  # the prompt of each held-out pair
    before: Measured
    after: Measured


def write_results(folder: Path, model: PreTrainedModel, results: Results) -> dict[str, Any]:
    """Write all files, summary.json last. Returns the summary."""
    before, after = results.before.evaluation, results.after.evaluation
    loss, metrics = results.settings["loss"], _by_step(results.trained.history)
    export_policy(model, results.task, folder / "actor")
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in metrics))
    write_samples(folder / "samples.md", before, after, _settings_line(results))
    draw_training(folder / CURVES, metrics, f"{loss} on {results.data['pairs']}")
    summary = {"env": results.settings["env"], "algorithm": loss, "seed": results.settings["seed"]}
    summary |= make_summary(before, after)
    numbers = {name: mean_and_error(values, results.clusters) for name, values in results.held_out.items()}
    summary |= {f"held_out_{name}": mean for name, (mean, _) in numbers.items()}
    summary |= {"iterations": metrics[-1]["iteration"], "seconds": results.trained.seconds}
    summary |= {"settings": dict(results.settings), "data": dict(results.data)} | machine(results.task.device)
    summary |= {FINGERPRINTS: dict(results.fingerprints)}
    write_card(folder / "actor", _card(folder, results, numbers))
    _write_page(folder, results, metrics, summary)
    write_json(folder / "summary.json", summary)
    return summary


def _by_step(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Numbers by optimizer step, which is an iteration here, as metrics.jsonl has them."""
    rows: dict[int, dict[str, Any]] = {}
    for row in history:
        numbers = {name: value for name, value in row.items() if name != "step"}
        rows.setdefault(row["step"], {"iteration": row["step"]}).update(numbers)
    return [rows[step] for step in sorted(rows)]


def _write_page(
    folder: Path, results: Results, metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """The page that a run has, with the held-out responses before and after."""
    steps = metrics[-1]["iteration"]
    outline = Outline(
        title=f"{results.settings['loss']} on {results.settings['env']}",
        seed=results.settings["seed"],
        iterations=steps,
        panels=[describe_panel(panel) for panel in PANELS],
        before=metrics[0],
        unit=STEP,
    )
    write_outline(folder, outline)
    records = RecordFile(folder, 0)
    records.begin(results.before.records)
    records.write(steps, HELD_OUT, results.after.records)
    write_page(folder, replace(read_report(folder, running=False), summary=summary))


def _settings_line(results: Results) -> str:
    """What shapes the responses, for their page."""
    settings, task = results.settings, results.task.config
    return (
        f"{settings['loss']} on {settings['env']}, seed {settings['seed']}: pairs {results.data['pairs']}, "
        f"β {settings['beta']:g}, learning rate {settings['learning_rate']:g}; temperature {task.temperature:g}, at "
        f"most {task.max_new_tokens} tokens a response."
    )


def _card(folder: Path, results: Results, numbers: Mapping[str, tuple[float, float | None]]) -> Card:
    settings = results.settings
    measured = [Number(f"held_out_{name}", *numbers[name], MEANINGS[name]) for name in MEANINGS]
    for name, meaning in (("score", "score"), ("gold", "gold score"), ("kl", "KL to the base, nats a response")):
        values = getattr(results.after.evaluation, name)
        if values:
            measured.append(Number(name, *mean_and_error(values), f"{meaning}, on held-out prompts"))
    return Card(
        title=f"Policy trained by {settings['loss']}",
        about=(
            "A language model trained on preference pairs without a rollout, from the base below, which is the "
            f"reference. β = {settings['beta']:g}; both distributions at temperature {settings['temperature']:g}."
        ),
        base=str(results.task.load_reference().model.name_or_path),
        data=results.data,
        settings=settings,
        numbers=measured,
        sections=[("Training", f"![loss, accuracy and margin over the training](../{CURVES})")],
        use=_use(folder / "actor", results),
        record={"history": results.trained.history, "seconds": results.trained.seconds},
    )


def _use(actor: Path, results: Results) -> str:
    """The command that measures the policy in its environment. What only its user knows is in capitals."""
    settings = results.settings
    items, base = settings["env_arg"], settings["base"]
    words = ["python -m agents best-of-n --output NEW_FOLDER --model", shlex.quote(str(actor))]
    words += [f"--env {settings['env']}"] * (settings["env"] != SettingConfig.env)
    words += [f"--env-arg {shlex.quote(item)}" for item in items]
    words += [f"--{name.replace('_', '-')} {shlex.quote(settings[name])}" for name in ASIDE if settings[name]]
    names = {*(item.partition("=")[0] for item in items), *gym.spec(id_of(settings["env"])).kwargs}
    if base is not None:
        words.append(f"--env.reference {shlex.quote(base)}")
    if base is not None or "reference" in names:  # else the environment has all parts
        words += [f"--env.{name} {what}" for name, what in PLACES.items() if name not in names]
    if results.task.config.chat and "chat" not in names:
        words.append("--env.chat")
    return " ".join(words)


def draw_training(path: Path, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the panels over the optimizer steps."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for axis, panel in zip(axes, PANELS, strict=True):
        for line in panel.lines:
            rows = [row for row in metrics if line.metric in row]
            places, values = [row["iteration"] for row in rows], [row[line.metric] for row in rows]
            style = "o-" if line.evaluated else "-"
            axis.plot(places, values, style, color=line.color, label=line.label, markersize=3)
        axis.set(title=panel.title, ylabel=panel.unit, xlabel=STEP)
        low, high = axis.get_ylim()
        axis.set_ylim(min([low, *panel.shows]), max([high, *panel.shows]))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def result_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Score, gold score, KL, pairs, and the files to look at."""
    lines = [
        f"{label} {summary[f'{name}_before']:+.2f} → {summary[f'{name}_after']:+.2f}"
        for name, label in (("score", "score"), ("gold", "gold "))
        if f"{name}_before" in summary
    ]
    return [
        *lines,
        f"KL {summary['kl_per_response']:.1f} nats a response, length {summary['length_before']:.0f} → "
        f"{summary['length_after']:.0f} tokens, {summary['iterations']} steps in {summary['seconds']:.0f} s",
        f"held-out pairs: accuracy {summary['held_out_accuracy']:.3f}, margin {summary['held_out_margin']:+.2f} nats",
        f"look at {folder}/{FILE}, read {folder}/samples.md; the model and its card are in {folder}/actor/",
    ]
