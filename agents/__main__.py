"""`python -m agents train | evaluate | generate | reward-model`: the only place that turns words into objects."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import agents
import textenv
from agents import run
from agents.checkpoint import load_config
from agents.config import TrainConfig
from agents.presets import defaults
from agents.reporting import report
from agents.text.config import GenerateConfig
from agents.text.experiment import TextExperiment
from agents.text.networks import language_model_of
from agents.text.shading import shaded_responses
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.training.reward_model import DEFAULT, RewardConfig, train_reward_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and does what it says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands = {
            "train": train_command(arguments),
            "evaluate": evaluate_command,
            "generate": generate_command,
            "reward-model": reward_model_command,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands,
            args=arguments,
            prog="python -m agents",
            description="Train a policy by reinforcement learning, measure it, and try it.",
        )
    except ValueError as error:
        if not _is_ours(error):
            raise
        raise SystemExit(_with_notes(f"error: {error}", error)) from error
    except KeyboardInterrupt as stop:
        print(_with_notes("\nstopped.", stop), file=sys.stderr)
        raise SystemExit(130) from None  # as shells count it


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The `train` command, with the flags of the environment and the algorithm that the command line names.

    Their defaults are the preset's, or those of the run that is resumed.
    """
    folder = _flag(arguments, "run")
    if "--resume" in arguments and folder is not None:
        config, settings, algorithm_config = load_config(Path(folder))
    else:
        config, settings, algorithm_config = defaults(_flag(arguments, "env"), _flag(arguments, "algorithm"))

    def train(shared: TrainConfig = config, environment: Any = settings, algorithm: Any = algorithm_config) -> None:
        """Train a policy; results go to the run's folder."""
        run.train(shared, environment, algorithm)

    train.__annotations__ = {
        "shared": tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[TrainConfig]],
        "environment": tyro.conf.OmitArgPrefixes[type(settings)],
        "algorithm": tyro.conf.OmitArgPrefixes[type(algorithm_config)],
        "return": None,
    }
    return train


def evaluate_command(run_folder: Annotated[Path, tyro.conf.arg(name="run")], output: Path | None = None) -> None:
    """Measure a trained policy again, as its run did.

    Args:
        run_folder: The folder that training wrote.
        output: A JSON file for the numbers, besides the terminal.
    """
    experiment, trainer = run.load(run_folder)
    numbers = experiment.summarize(experiment.evaluate(trainer.algorithm.networks.policy))
    for name, value in numbers.items():
        print(f"{name:18} {value:.4f}")
    if output is not None:
        report.write_json(output, numbers)


def generate_command(
    run_folder: Annotated[Path, tyro.conf.arg(name="run")], config: tyro.conf.OmitArgPrefixes[GenerateConfig]
) -> None:
    """Let a trained policy answer a prompt of your own.

    Args:
        run_folder: The folder that training wrote.
        config: What to answer, and how.
    """
    experiment, trainer = run.load(run_folder)
    if not isinstance(experiment, TextExperiment):
        raise ValueError(f"the run in {str(run_folder)!r} is no run on text, and has nothing to write.")
    task, model = experiment.task, language_model_of(trainer.algorithm.networks.policy)
    prompts = task.read_prompts([config.prompt] * config.samples)
    generator = torch.Generator(task.device).manual_seed(config.seed)
    if config.color != "none":
        scale, texts = shaded_responses(trainer, prompts, generator, config.color)
        print(f"[{config.color}: blue below zero, red above, strongest at {scale:.2g}]", *texts, sep="\n")
        return
    temperature = task.config.temperature if config.temperature is None else config.temperature
    sampling = Sampling(temperature=temperature, top_k=config.top_k, top_p=config.top_p)
    state = generate(task, model, prompts, sampling, generator).state
    scored = score_responses(task.without_normalization(), state, prompts.texts, fields=prompts.fields)
    for score, response in zip(scored.score.tolist(), scored.responses, strict=True):
        print(f"[score {score:+.2f}] {config.prompt}{response}")


def reward_model_command(
    base: str, data: Path, output: Path, config: tyro.conf.OmitArgPrefixes[RewardConfig] = DEFAULT
) -> None:
    """Train a reward model from preference pairs or labeled texts.

    Args:
        base: Folder or hub name of a causal language model or a sequence-classification model.
        data: JSONL of {prompt?, chosen, rejected} or of {prompt?, text, label}, label 0 or 1.
        output: Folder for the reward model.
        config: How to train.
    """
    try:
        train_reward_model(base, data, output, config)
    except ImportError as error:
        raise ValueError(f"{error} Install it with: pip install 'textenv[reward-model]'") from error


def _with_notes(sentence: str, error: BaseException) -> str:
    return " ".join([sentence, *getattr(error, "__notes__", [])])


def _is_ours(error: BaseException) -> bool:
    """Whether a sentence of this project, which says the remedy; anything else is worth its traceback."""
    ours = {Path(package.__file__).parent for package in (agents, textenv) if package.__file__}
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(folder in raised_in.parents for folder in ours)


def _flag(arguments: Sequence[str], name: str) -> Any:
    """A flag's last value, read ahead of the rest, where it decides which flags there are."""
    found = getattr(TrainConfig, name)
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == f"--{name}" and following is not None:
            found = following
        elif argument.startswith(f"--{name}="):
            found = argument.partition("=")[2]
    return found


if __name__ == "__main__":
    main()
