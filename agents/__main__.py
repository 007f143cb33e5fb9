"""`python -m agents train | evaluate | generate | play | reward-model`: the command line makes objects of names."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from agents import run, run_folder
from agents.config import TrainConfig
from agents.domains import arguments_of
from agents.interfaces import Experiment
from agents.play import PlayConfig, show
from agents.presets import defaults, describe_defaults
from agents.ranks import RankError
from agents.reporting import profile
from agents.reporting.errors import is_ours
from agents.reporting.files import as_utf8, ending_with_the_reader, never_fail_to_print, write_json
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
from textenv.training.reward_model import DEFAULT, RewardConfig, train_reward_model

EPISODES = PlayConfig()
DESCRIPTION = "Train a policy by reinforcement learning, evaluate it, generate from it, play and profile it."


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command.

    Errors that our own code raises end in a one-line message and exit code 1; all others keep their traceback.
    """
    never_fail_to_print()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands = {
            "train": job_command(arguments, run.train, "Train a policy and write the results to the run folder."),
            "evaluate": evaluate_command,
            "generate": generate_command,
            "play": play_command,
            "profile": job_command(arguments, profile_job, "Measure where the time of one iteration goes."),
            "reward-model": reward_model_command,
        }
        with ending_with_the_reader():
            tyro.extras.subcommand_cli_from_dict(
                commands, args=arguments, prog="python -m agents", description=DESCRIPTION
            )
    except (ValueError, TypeError) as error:
        if not is_ours(error):
            raise
        raise SystemExit(_with_notes(f"error: {error}", error)) from error
    except RankError as error:
        raise SystemExit(_with_notes(f"stopped, because of another process: {error}", error)) from None
    except KeyboardInterrupt as stop:
        print(_with_notes("\nstopped.", stop), file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None  # the shell's convention


def job_command(arguments: Sequence[str], action: Callable[..., Any], purpose: str) -> Callable[..., None]:
    """A command with flags for the environment and the algorithm that the command line names.

    Defaults come from the preset, or from the run's configuration under --resume.
    """
    folder = _flag(arguments, "run")
    if "--resume" in arguments and folder is not None:
        config, settings, algorithm_config = run_folder.load_config(Path(folder))
        source = "Defaults: the settings of the run."
    else:
        env, name, env_arg = _flag(arguments, "env"), _flag(arguments, "algorithm"), _flags(arguments, "env_arg")
        given = TrainConfig(env=env, algorithm=name, env_arg=tuple(env_arg))
        adapters = ["0", *_flags(arguments, "lora_rank")][-1] != "0"
        config, settings, algorithm_config = defaults(env, name, arguments_of(given), adapters)
        source = describe_defaults(given, adapters)

    def job(shared: TrainConfig = config, environment: Any = settings, algorithm: Any = algorithm_config) -> None:
        action(shared, environment, algorithm)

    job.__doc__ = f"{purpose}\n\n{source}"
    job.__annotations__ = {
        "shared": tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[TrainConfig]],
        "environment": tyro.conf.OmitArgPrefixes[type(settings)],
        "algorithm": tyro.conf.OmitArgPrefixes[type(algorithm_config)],
        "return": None,
    }
    return job


def profile_job(config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Print the phases of one iteration, and write them with a trace to the run folder."""
    if config.resume:
        raise ValueError("a profile is of a new run; leave --resume out.")
    folder = Path(config.run or f"{run.default_folder(config)}-profile")
    if os.path.exists(folder):
        run_folder.refuse(folder)
    experiment, trainer = run.build(
        replace(config, iterations=profile.ITERATIONS, schedule="constant"), settings, algorithm_config
    )
    run_folder.create(folder)
    print(f"{config.algorithm} on {config.env} {experiment.describe()}")
    files = folder / "profile.json", folder / "trace.json.gz"
    measured, unit = profile.profile_iterations(trainer, files[1]), experiment.collector.unit
    profile.write_profile(measured, unit, trainer.device, files[0])
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(measured.table(unit))
    print(*profile.lines(measured, files), sep="\n")


def evaluate_command(folder: Annotated[Path, tyro.conf.arg(name="run")], output: Path | None = None) -> None:
    """Evaluate a trained policy in the same way as its training run did.

    Args:
        folder: Run folder written by `train`.
        output: JSON file to write the numbers to, in addition to printing them.
    """
    if output is not None:
        _check_output(output)
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


def _check_output(file: Path) -> None:
    """Raise ValueError for a file that cannot be written, before the work whose results it is to hold."""
    folder = file.absolute().parent
    if not os.path.isdir(folder):
        raise ValueError(f"--output names a file in {str(folder)!r}, which is no folder; create it first.")
    if os.path.isdir(file):
        raise ValueError(f"--output must name a file, and {str(file)!r} is a folder; give it a file's name.")
    check_name(file, "--output")


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


def terminate(number: int, frame: object) -> None:
    """End as with Ctrl-C: with the way to go on. A second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
