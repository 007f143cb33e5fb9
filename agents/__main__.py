"""`python -m agents train | evaluate | generate | play | reward-model`: the command line makes objects of names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from agents import run
from agents.checkpoint import load_config
from agents.config import TrainConfig
from agents.errors import is_ours
from agents.play import PlayConfig, show
from agents.presets import defaults, describe_defaults
from agents.reporting import report
from agents.text.config import GenerateConfig
from agents.text.experiment import TextExperiment
from agents.text.networks import language_model_of
from agents.text.shading import shaded_responses
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.training.reward_model import DEFAULT, RewardConfig, train_reward_model

EPISODES = PlayConfig()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command.

    Errors that our own code raises end in a one-line message and exit code 1; all others keep their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands = {
            "train": train_command(arguments),
            "evaluate": evaluate_command,
            "generate": generate_command,
            "play": play_command,
            "reward-model": reward_model_command,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands,
            args=arguments,
            prog="python -m agents",
            description="Train a policy by reinforcement learning, evaluate it, generate from it, and play it.",
        )
    except (ValueError, TypeError) as error:
        if not is_ours(error):
            raise
        raise SystemExit(_with_notes(f"error: {error}", error)) from error
    except KeyboardInterrupt as stop:
        print(_with_notes("\nstopped.", stop), file=sys.stderr)
        raise SystemExit(130) from None  # the shell convention: 128 + SIGINT


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The `train` command, with flags for the environment and the algorithm that the command line names.

    Defaults come from the preset, or from the run's configuration under --resume.
    """
    folder = _flag(arguments, "run")
    if "--resume" in arguments and folder is not None:
        config, settings, algorithm_config = load_config(Path(folder))
        source = "Defaults: the settings of the run."
    else:
        env, name, env_arg = _flag(arguments, "env"), _flag(arguments, "algorithm"), _flags(arguments, "env_arg")
        given = TrainConfig(env=env, algorithm=name, env_arg=tuple(env_arg))
        config, settings, algorithm_config = defaults(env, name, given.env_arguments())
        source = describe_defaults(given)

    def train(shared: TrainConfig = config, environment: Any = settings, algorithm: Any = algorithm_config) -> None:
        run.train(shared, environment, algorithm)

    train.__doc__ = f"Train a policy and write the results to the run folder.\n\n{source}"

    train.__annotations__ = {
        "shared": tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[TrainConfig]],
        "environment": tyro.conf.OmitArgPrefixes[type(settings)],
        "algorithm": tyro.conf.OmitArgPrefixes[type(algorithm_config)],
        "return": None,
    }
    return train


def evaluate_command(run_folder: Annotated[Path, tyro.conf.arg(name="run")], output: Path | None = None) -> None:
    """Evaluate a trained policy in the same way as its training run did.

    Args:
        run_folder: Run folder written by `train`.
        output: JSON file to write the numbers to, in addition to printing them.
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
    """Sample responses to your own prompt from a trained policy.

    Args:
        run_folder: Run folder written by `train`.
        config: The prompt, and how to sample.
    """
    experiment, trainer = run.load(run_folder)
    if not isinstance(experiment, TextExperiment):
        raise ValueError(
            f"the run in {str(run_folder)!r} was not trained on text, so it cannot generate any; use evaluate."
        )
    task, model = experiment.task, language_model_of(trainer.algorithm.networks.policy)
    prompts = task.read_prompts([config.prompt] * config.samples)
    generator = torch.Generator(task.device).manual_seed(config.seed)
    if config.color != "none":
        scale, texts = shaded_responses(trainer, prompts, generator, config.color)
        print(f"[{config.color}: blue below zero, red above, full color at {scale:.2g}]", *texts, sep="\n")
        return
    temperature = task.config.temperature if config.temperature is None else config.temperature
    sampling = Sampling(temperature=temperature, top_k=config.top_k, top_p=config.top_p)
    state = generate(task, model, prompts, sampling, generator).state
    scored = score_responses(task.without_normalization(), state, prompts.texts, fields=prompts.fields)
    for score, response in zip(scored.score.tolist(), scored.responses, strict=True):
        print(f"[score {score:+.2f}] {config.prompt}{response}")


def play_command(
    run_folder: Annotated[Path, tyro.conf.arg(name="run")], config: tyro.conf.OmitArgPrefixes[PlayConfig] = EPISODES
) -> None:
    """Watch or record the policy of a finished run.

    Args:
        run_folder: Run folder written by `train`.
        config: How many episodes, and where they are shown.
    """
    show(run_folder, config)


def reward_model_command(
    base: str, data: Path, output: Path, config: tyro.conf.OmitArgPrefixes[RewardConfig] = DEFAULT
) -> None:
    """Train a reward model from preference pairs or labeled texts.

    Args:
        base: Folder or Hugging Face Hub name of a causal language model or a sequence-classification model.
        data: JSONL file of {prompt?, chosen, rejected} or of {prompt?, text, label}, where label is 0 or 1.
        output: Folder to write the reward model to.
        config: Training settings.
    """
    try:
        train_reward_model(base, data, output, config)
    except ImportError as error:
        raise ValueError(f"{error} Install it with: pip install 'textenv[reward-model]'") from error


def _with_notes(sentence: str, error: BaseException) -> str:
    return " ".join([sentence, *getattr(error, "__notes__", [])])


def _flag(arguments: Sequence[str], name: str) -> Any:
    """The last value of a flag, or its default; read before parsing because it decides which other flags exist."""
    return [getattr(TrainConfig, name), *_flags(arguments, name)][-1]


def _flags(arguments: Sequence[str], name: str) -> list[str]:
    """All values of a flag, in either spelling: `--env-arg A --env_arg=B`."""
    values = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        flag, equals, value = argument.partition("=")
        if flag.replace("-", "_") == f"__{name}" and (equals or following is not None):
            values.append(value if equals else following)
    return values


if __name__ == "__main__":
    main()
