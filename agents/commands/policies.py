"""`evaluate`, `generate` and `play`: commands that open the policy of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from agents import run, run_folder
from agents.interfaces import Experiment
from agents.play import PlayConfig, show
from agents.reporting.files import as_utf8
from agents.text.config import GenerateConfig
from agents.text.experiment import TextExperiment
from agents.text.fingerprints import EVALUATION, REFERENCE, TRAINING
from agents.text.networks import language_model_of
from agents.text.shading import shaded_responses
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import Prompts
from textenv.settings import check_name
from textenv.task import Task
from textenv.training.files import UNFINISHED, write_json

EPISODES = PlayConfig()


def evaluate_command(folder: Annotated[Path, tyro.conf.arg(name="run")], output: Path | None = None) -> None:
    """Evaluate a trained policy in the same way as its training run did.

    Args:
        folder: Run folder written by `train`.
        output: JSON file to write the numbers to, in addition to printing them.
    """
    if output is not None:
        output = _checked_output(output)
    experiment, policy = run.load_policy(folder)
    _tell_changes(folder, experiment, {TRAINING})
    numbers = experiment.summarize(experiment.evaluate(policy))
    for name, value in numbers.items():
        print(f"{name:18} {value:.4f}")
    if output is not None:
        try:
            write_json(output, numbers)
        except OSError as error:
            raise ValueError(f"--output cannot be written: {error.strerror}; choose another file.") from error


def generate_command(
    folder: Annotated[Path, tyro.conf.arg(name="run")], config: tyro.conf.OmitArgPrefixes[GenerateConfig]
) -> None:
    """Sample responses to your own prompt from a trained policy.

    Args:
        folder: Run folder written by `train`.
        config: The prompt, and how to sample.
    """
    load = run.load_policy if config.color == "none" else run.load_networks
    experiment, loaded = load(folder)
    if not isinstance(experiment, TextExperiment):
        raise ValueError(
            f"the run in {str(folder)!r} was not trained on text, so it cannot generate any; use evaluate."
        )
    unused = {TRAINING, EVALUATION, REFERENCE} if config.color == "none" else {TRAINING, EVALUATION}
    _tell_changes(folder, experiment, unused)
    prompt = as_utf8(config.prompt)
    prompts = experiment.task.read_prompts([prompt] * config.samples)
    generator = torch.Generator(experiment.task.device).manual_seed(config.seed)
    if isinstance(loaded, nn.Module):
        print(*_responses(experiment.task, loaded, prompts, generator, config), sep="\n")
    else:
        scale, texts = shaded_responses(loaded, experiment.collector, prompts, generator, config.color)
        print(f"[{config.color}: blue below zero, red above, full color at {scale:.2g}]", *texts, sep="\n")


def play_command(
    run_folder: Annotated[Path, tyro.conf.arg(name="run")], config: tyro.conf.OmitArgPrefixes[PlayConfig] = EPISODES
) -> None:
    """Watch or record the policy of a finished run.

    Args:
        run_folder: Run folder written by `train`.
        config: How many episodes, and where they are shown.
    """
    show(run_folder, config)


def _checked_output(given: Path) -> Path:
    """The file that a name leads to. Raises ValueError if it cannot be written, before the work on its content."""
    if os.path.exists(given) and not os.path.isfile(given) and not os.path.isdir(given):
        raise ValueError(f"--output must name a file, and {str(given)!r} is a device or a pipe; choose another name.")
    file = Path(os.path.realpath(given))  # a link stays, and what it leads to is replaced
    folder = file.parent
    if not os.path.isdir(folder):
        raise ValueError(f"--output names a file in {str(folder)!r}, which is no folder; create it first.")
    if os.path.isdir(file):
        raise ValueError(f"--output must name a file, and {str(file)!r} is a folder; give it a file's name.")
    check_name(file.with_name(f"{file.name}{UNFINISHED}"), "--output")
    return file


def _responses(
    task: Task, policy: nn.Module, prompts: Prompts, generator: torch.Generator, config: GenerateConfig
) -> list[str]:
    """One response per prompt, with its score."""
    temperature = task.config.temperature if config.temperature is None else config.temperature
    sampling = Sampling(temperature=temperature, top_k=config.top_k, top_p=config.top_p)
    state = generate(task, language_model_of(policy), prompts, sampling, generator).state
    scored = score_responses(task.without_normalization(), state, prompts.texts, fields=prompts.fields)
    rows = zip(scored.score.tolist(), prompts.texts, scored.responses, strict=True)
    return [f"[score {score:+.2f}] {prompt}{response}" for score, prompt, response in rows]


def _tell_changes(folder: Path, experiment: Experiment, unused: set[str]) -> None:
    """Say which models and prompts are not those of the run; unused: those that do not matter here."""
    names = [name for name in run_folder.changed(folder, experiment.fingerprints()) if name not in unused]
    if names:
        print(
            f"note: changed since the run was started: {', '.join(names)}. Numbers that depend on it differ.",
            file=sys.stderr,
        )
