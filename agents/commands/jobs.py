"""`train` and `profile`: commands whose flags depend on the environment and the algorithm that are named."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from agents import run, run_folder
from agents.commands import flags
from agents.config import TrainConfig
from agents.domains import TEXT, arguments_of, domain_of, environment_settings
from agents.presets import defaults, describe_defaults
from agents.ranks import connected
from agents.reporting import estimate as sizes
from agents.reporting import profile

HELP = """

Args:
    config: A run folder, or its config.json: start a run with the same settings, but for the flags beside it.
    estimate: Print what memory and disk the run will need, and end without it. Under torchrun, of each process.
"""


def job_command(arguments: Sequence[str], action: Callable[..., Any], purpose: str, prog: str) -> Callable[..., None]:
    """A command with flags for the environment and the algorithm that its arguments name.

    Defaults come from the preset, from the run's configuration under --resume, or from that of --config.
    """
    (config, settings, algorithm_config), source = _defaults(arguments)
    if flags.values_of(arguments, "tracker"):
        config = replace(config, tracker=())  # those given replace the default, and are not appended to it
    classes = TrainConfig, type(settings), type(algorithm_config)
    flags.refuse_misplaced(arguments, classes, config.env, config.algorithm, prog)
    flags.refuse_twice(arguments)
    text = domain_of(config.env) is TEXT

    def job(shared: TrainConfig, domain: Any, algorithm: Any, estimate: bool, **others: Any) -> None:
        chosen = shared.with_env_arg(flags.of_environment(arguments)), domain, algorithm
        if estimate:
            _print_estimate(*chosen)
        else:
            action(*chosen)

    shared = Annotated[tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[TrainConfig]], tyro.conf.arg(name="run")]
    parts: dict[str, tuple[Any, Any]] = {
        "config": (Path | None, None),
        "estimate": (bool, False),
        "shared": (shared, config),
    }
    if text:
        given = replace(config, env_arg=(*config.env_arg, *flags.values_of(arguments, "env_arg")))
        parts["environment"] = (flags.Environment, environment_settings(given))
    parts["domain"] = (_group(settings, "text" if text else "control"), settings)
    parts["algorithm"] = (_group(algorithm_config, config.algorithm), algorithm_config)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in parts.items()
    ]
    job.__doc__ = f"{purpose}\n\n{source}{HELP}"
    job.__annotations__ = {name: annotation for name, (annotation, _) in parts.items()}
    job.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return job


def _group(settings: Any, title: str) -> Any:
    return Annotated[tyro.conf.OmitArgPrefixes[type(settings)], tyro.conf.arg(name=title)]


def _defaults(arguments: Sequence[str]) -> tuple[tuple[TrainConfig, Any, Any], str]:
    """The three parts of the configuration before the flags, and where they come from in a sentence."""
    folder, file = _last(arguments, "run"), next(reversed(flags.values_of(arguments, "config")), None)
    if "--resume" in arguments and folder is not None:
        if file is not None:
            raise ValueError("--resume goes on with the run's own settings; leave --config out.")
        return run_folder.load_config(Path(folder)), "Defaults: the settings of the run."
    if file is not None:
        return _like(Path(file), arguments), f"Defaults: the settings in {file}."
    env, name, env_arg = _last(arguments, "env"), _last(arguments, "algorithm"), flags.values_of(arguments, "env_arg")
    given = TrainConfig(env=env, algorithm=name, env_arg=tuple(env_arg)).with_env_arg(flags.of_environment(arguments))
    adapters = ["0", *flags.values_of(arguments, "lora_rank")][-1] != "0"
    return defaults(env, name, arguments_of(given), adapters), describe_defaults(given, adapters)


def _like(file: Path, arguments: Sequence[str]) -> tuple[TrainConfig, Any, Any]:
    """The settings of another run. Raises ValueError for flags beside them that ask for other settings altogether."""
    parts = run_folder.settings_of(file)
    config = parts[0]
    env = [config.env, *flags.values_of(arguments, "env")][-1]
    if domain_of(env) is not domain_of(config.env):
        raise ValueError(f"--config {file} is of a run on {config.env}, whose settings do not fit --env {env}.")
    name = [config.algorithm, *flags.values_of(arguments, "algorithm")][-1]
    if name != config.algorithm:
        raise ValueError(
            f"--config {file} is of a run of {config.algorithm}, whose settings do not fit --algorithm {name}; leave "
            "one of them out."
        )
    return replace(config, env=env), *parts[1:]


def _print_estimate(config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Print what a run will need and what is free."""
    if os.environ.get("RANK", "0") != "0":
        return
    if config.resume and config.run is not None:  # names of files are read from where the run was started
        config, settings = run_folder.located(Path(config.run), config, settings)
    needs = sizes.of_run(config, settings, algorithm_config, int(os.environ.get("WORLD_SIZE", "1")))
    room = sizes.free(config, Path(config.run or "."))
    print(sizes.table(needs, *room), *sizes.warnings(needs, *room), sep="\n")


def profile_job(config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Print the phases of one iteration, and write them with a trace to the run folder."""
    if config.resume:
        raise ValueError("a profile is of a new run; leave --resume out.")
    with connected(config.rank_timeout) as ranks:
        folder = ranks.lead(lambda: Path(config.run or f"{run.default_folder(config)}-profile"))
        ranks.lead(lambda: run_folder.check_new(folder))
        config = replace(config, iterations=profile.ITERATIONS, schedule="constant")
        in_step = vars(settings).get("shard", "none") != "none"  # ranks meet wherever sharded weights are made
        experiment, trainer = ranks.together(lambda: run.build(config, settings, algorithm_config, ranks), in_step)
        ranks.lead(lambda: run_folder.create(folder))
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not ranks.first)
        console.print(f"{config.algorithm} on {config.env} {experiment.describe()}")
        files, unit = (folder / "profile.json", folder / "trace.json.gz"), experiment.collector.unit
        try:
            own = profile.profile_iterations(trainer, files[1])
            measured = ranks.each(lambda: own)
            ranks.lead(lambda: profile.write_profile(measured, unit, trainer.device, files[0]))
        except BaseException:
            if ranks.first:
                shutil.rmtree(folder, ignore_errors=True)  # else the next try would be refused
            raise
        console.print(own.table(unit))
        console.print(*profile.rank_lines(measured), *profile.remarks(own, files), sep="\n")


def _last(arguments: Sequence[str], name: str) -> Any:
    """The last value of a flag, or its default; read before parsing because it decides which other flags exist."""
    return [getattr(TrainConfig, name), *flags.values_of(arguments, name)][-1]
