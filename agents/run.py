"""A training run from start to finish: build, evaluate, train, evaluate again, and write the results to a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from agents import checkpoint, run_folder
from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.domains import domain_of
from agents.interfaces import Algorithm, Experiment
from agents.presets import describe_defaults
from agents.reporting import plots, report
from agents.reporting.files import never_fail_to_print, no_room, write_json
from agents.trainer import Trainer
from agents.unread import Job, check_settings


def build(config: TrainConfig, settings: Any, algorithm_config: Any) -> tuple[Experiment, Trainer]:
    """The experiment for an environment, and a trainer at iteration 0."""
    experiment = domain_of(config.env).open(config, settings)
    _, algorithm = find_algorithm(config.algorithm)
    learner = algorithm(algorithm_config, experiment.network_factory)
    check_settings(Job(config, settings, algorithm_config, experiment, learner))
    return experiment, Trainer(config, learner, experiment.collector)


def load_policy(folder: Path) -> tuple[Experiment, nn.Module]:
    """Experiment and policy as of the last checkpoint of the run in `folder`, on any device, to measure and to play."""
    experiment, algorithm = _reopen(folder)
    return experiment, checkpoint.load_policy(folder, algorithm, experiment.collector)


def load_networks(folder: Path) -> tuple[Experiment, Algorithm]:
    """Experiment and learner with all its networks as of the last checkpoint of the run in `folder`, on any device."""
    experiment, algorithm = _reopen(folder)
    checkpoint.load_networks(folder, algorithm, experiment.collector)
    return experiment, algorithm


def train(config: TrainConfig, settings: Any, algorithm_config: Any) -> dict[str, Any]:
    """Train, write the results, and return the summary, which is also written to summary.json."""
    never_fail_to_print()
    console = Console(markup=False, highlight=False, soft_wrap=True)
    folder, parts = Path(config.run or default_folder(config)), (config, settings, algorithm_config)
    with ExitStack() as stack:
        if config.resume:
            run_folder.check_same(folder, *parts)
            stack.enter_context(run_folder.locked(folder))
            if (summary := _finished(folder, config)) is not None:
                console.print(f"the run in {folder}/ is finished, with {config.iterations} iterations.")
                return summary
            config, settings = run_folder.located(folder, config, settings)
        else:
            run_folder.check_new(folder)
        experiment, trainer = build(config, settings, algorithm_config)
        fingerprints = experiment.fingerprints()
        before = experiment.evaluate(trainer.algorithm.networks.policy)
        if config.resume:
            run_folder.check_unchanged(folder, fingerprints)
            checkpoint.load_checkpoint(folder, trainer)
            run_folder.lengthen(folder, config)
        else:
            run_folder.create(folder)
        stack.enter_context(_resumable(folder, config.resume))
        if not config.resume:
            stack.enter_context(run_folder.locked(folder))
            run_folder.save_config(folder, *parts, fingerprints)
            experiment.save_prompts(folder)
            checkpoint.save_checkpoint(folder, trainer)  # the run can be resumed from here on
            checkpoint.iterations_done(folder)  # raises if something in it cannot be read again
        source = describe_defaults(config, getattr(settings, "lora_rank", 0) > 0)
        console.print(f"{_title(config)} {experiment.describe()}\n{source}\nresults in {folder}/")
        rows = _iterate(folder, console, experiment, trainer)
        summary = _write_results(folder, rows, experiment, trainer, before)
        console.print("\n".join(experiment.result_lines(summary, folder)))
    return summary


def default_folder(config: TrainConfig) -> str:
    """The folder of a run without --run."""
    return f"runs/{config.env}-{config.algorithm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _reopen(folder: Path) -> tuple[Experiment, Algorithm]:
    config, settings, algorithm_config = run_folder.load_config(folder)
    config, settings = run_folder.located(folder, config, settings)
    experiment = domain_of(config.env).reopen(config, settings, folder)
    return experiment, find_algorithm(config.algorithm)[1](algorithm_config, experiment.network_factory)


def _finished(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the run, if it has nothing left to do."""
    if checkpoint.iterations_done(folder) < config.iterations:
        return None
    return run_folder.finished_summary(folder, config.iterations)


def _iterate(folder: Path, console: Console, experiment: Experiment, trainer: Trainer) -> list[dict[str, Any]]:
    """Train with reports and checkpoints. Returns the metrics of all iterations."""
    config = trainer.config
    with (
        closing(report.Scalars(folder, trainer.iteration)) as scalars,
        report.Bar(console, config.iterations, trainer.iteration) as bar,
    ):
        if scalars.lost:
            console.print(f"metrics.jsonl was damaged: the metrics of {scalars.lost} iterations are lost.")
        for iteration in trainer.iterate():
            metrics = iteration.metrics | experiment.report_metrics(iteration.rollout)
            scalars.write(iteration.number, metrics)
            bar.show(iteration.number, experiment.progress_line(metrics))
            for line in experiment.remarks(iteration.number, metrics):
                console.print(line)
            if iteration.number % config.checkpoint_every == 0 or iteration.number == config.iterations:
                checkpoint.save_checkpoint(folder, trainer)
    return scalars.rows


def _write_results(
    folder: Path, rows: list[dict[str, Any]], experiment: Experiment, trainer: Trainer, before: Any
) -> dict[str, Any]:
    """Evaluate, and write pictures, what the experiment writes, and last of all the summary."""
    config, unit = trainer.config, experiment.collector.unit
    after = experiment.evaluate(trainer.algorithm.networks.policy)
    plots.draw_curves(folder / "curves.png", rows, f"{_title(config)}, seed {config.seed}", experiment.panels())
    summary = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed}
    summary |= experiment.write_results(folder, trainer, before, after)
    summary |= {"iterations": trainer.iteration, unit: trainer.steps, "seconds": trainer.seconds}
    summary |= {f"{unit}_per_second": trainer.steps / max(trainer.seconds, 1e-9)}
    summary |= report.machine(trainer.device)
    write_json(folder / "summary.json", summary)
    return summary


def _title(config: TrainConfig) -> str:
    return f"{config.algorithm} on {config.env}"


@contextmanager
def _resumable(folder: Path, resumed: bool) -> Iterator[None]:
    """Add to any error how to resume the run. A new run that fails before its first report leaves no folder.

    A full disk is a ValueError.
    """
    try:
        yield
    except BaseException as error:
        full = no_room(error)
        shown = (
            error
            if full is None
            else ValueError(
                f"the run folder {str(folder)!r} cannot be written: {full.strerror}. Make room on that disk."
            )
        )
        metrics = folder / "metrics.jsonl"
        reported = os.path.isfile(metrics) and metrics.stat().st_size > 0
        without_checkpoint = not os.path.isfile(folder / checkpoint.FILE)
        if not resumed and (without_checkpoint or (not reported and isinstance(error, Exception))):
            shutil.rmtree(folder)
        elif not without_checkpoint:
            shown.add_note(
                f"The last checkpoint is good: continue from it with --run {shlex.quote(str(folder))} --resume."
            )
        if shown is not error:
            raise shown from error
        raise
