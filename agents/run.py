"""A training run from start to finish: build, evaluate, train, evaluate again, and write the results to a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from agents import checkpoint, run_folder
from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.domains import domain_of
from agents.interfaces import Algorithm, Experiment
from agents.presets import describe_defaults, has_adapters
from agents.ranks import ALONE, Ranks, connected, restarted
from agents.reporting import plots, report
from agents.reporting.files import never_fail_to_print, no_room, write_json
from agents.trainer import Trainer
from agents.unread import Job, check_settings


def build(
    config: TrainConfig, settings: Any, algorithm_config: Any, ranks: Ranks = ALONE
) -> tuple[Experiment, Trainer]:
    """The experiment for an environment, and a trainer at iteration 0."""
    experiment = domain_of(config.env).open(config, settings, ranks)
    _, algorithm = find_algorithm(config.algorithm)
    learner = algorithm(algorithm_config, experiment.network_factory)
    check_settings(Job(config, settings, algorithm_config, experiment, learner))
    return experiment, Trainer(config, learner, experiment.collector, ranks)


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
    """Train, write the results, and return the summary, which is also written to summary.json.

    Under torchrun all ranks learn together, and the first one writes and reports.
    """
    never_fail_to_print()
    with connected(config.rank_timeout) as ranks, ExitStack() as stack:
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not ranks.first)
        folder = ranks.lead(lambda: Path(config.run or default_folder(config)))  # the time is in its name
        if ranks.lead(lambda: restarted() and os.path.isfile(folder / checkpoint.FILE)):
            config = replace(config, run=str(folder), resume=True)
        parts = config, settings, algorithm_config
        if (summary := ranks.lead(lambda: _claim(folder, parts, stack))) is not None:
            console.print(f"the run in {folder}/ is finished, with {config.iterations} iterations.")
            return summary
        experiment, trainer = ranks.together(lambda: build(*_located(folder, parts), ranks))
        config, fingerprints = trainer.config, _agreed(experiment.fingerprints, ranks, "models and prompts")
        before = experiment.evaluate(trainer.algorithm.networks.policy)
        if config.resume:
            ranks.together(lambda: _restore(folder, trainer, fingerprints))
            _agreed(lambda: trainer.iteration, ranks, "checkpoints; all must see one run folder")
        ranks.lead(lambda: _open(folder, parts, experiment, trainer, fingerprints, stack))
        source = describe_defaults(config, has_adapters(settings))
        console.print(f"{_title(config)} {experiment.describe()}\n{source}\nresults in {folder}/")
        rows = _iterate(folder, console, experiment, trainer)
        summary = _write_results(folder, rows, experiment, trainer, before)
        if ranks.first:
            console.print("\n".join(experiment.result_lines(summary, folder)))
    return summary


def _claim(folder: Path, parts: tuple[TrainConfig, Any, Any], stack: ExitStack) -> dict[str, Any] | None:
    """Refuse a folder that this run may not use; lock that of a resumed one. Returns the summary of a finished run."""
    if not parts[0].resume:
        return run_folder.check_new(folder)
    run_folder.check_same(folder, *parts)
    stack.enter_context(run_folder.locked(folder))
    return _finished(folder, parts[0])


def _located(folder: Path, parts: tuple[TrainConfig, Any, Any]) -> tuple[TrainConfig, Any, Any]:
    """The configuration to build from. That of a resumed run names files from where it was started."""
    if not parts[0].resume:
        return parts
    run_folder.load_config(folder)  # so that the run's own modules are found, on every rank
    return *run_folder.located(folder, *parts[:2]), parts[2]


def _agreed(work: Callable[[], Any], ranks: Ranks, what: str) -> Any:
    """What `work` returns on every rank. Raises ValueError where it differs: ranks would learn different things."""
    found = ranks.each(work)
    if any(other != found[0] for other in found):
        raise ValueError(f"the processes of torchrun have different {what}: {found}.")
    return found[0]


def _restore(folder: Path, trainer: Trainer, fingerprints: Mapping[str, str]) -> None:
    run_folder.check_unchanged(folder, fingerprints)
    checkpoint.load_checkpoint(folder, trainer)


def _open(
    folder: Path,
    parts: tuple[TrainConfig, Any, Any],
    experiment: Experiment,
    trainer: Trainer,
    fingerprints: Mapping[str, str],
    stack: ExitStack,
) -> None:
    """Create the folder of a new run, with what it can be resumed from. From here on, errors say how to go on."""
    resume = parts[0].resume
    if resume:
        run_folder.lengthen(folder, parts[0])
    else:
        run_folder.create(folder)
    stack.enter_context(_resumable(folder, resume))
    if not resume:
        stack.enter_context(run_folder.locked(folder))
        run_folder.save_config(folder, *parts, fingerprints)
        experiment.save_prompts(folder)
        checkpoint.save_checkpoint(folder, trainer)
        checkpoint.iterations_done(folder)  # raises if something in it cannot be read again


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
    """Train with reports and checkpoints, both by the first rank. Returns the metrics of all iterations."""
    config = trainer.config
    if not trainer.ranks.first:
        return [iteration.metrics for iteration in trainer.iterate()]
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
    results = experiment.write_results(folder, trainer, before, after)
    if not trainer.ranks.first:
        return {}
    plots.draw_curves(folder / "curves.png", rows, f"{_title(config)}, seed {config.seed}", experiment.panels())
    summary = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed} | results
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
