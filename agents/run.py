"""A training run from start to finish: build, evaluate, train, evaluate again, and write the results to a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from agents import checkpoint, run_folder
from agents.algorithms.registry import find_algorithm
from agents.config import BEST, TrainConfig
from agents.domains import domain_of
from agents.interfaces import Algorithm, Experiment
from agents.presets import describe_rates, has_adapters
from agents.ranks import ALONE, Ranks, connected, restarted
from agents.reporting import dumps, plots, report, trackers, viewer
from agents.reporting import estimate as sizes
from agents.reporting.alarms import find_alarms
from agents.reporting.errors import stop_behind
from agents.reporting.files import never_fail_to_print, tell_a_full_disk_once
from agents.reporting.record_file import HELD_OUT, ROLLOUT, RecordFile
from agents.text.config import TextConfig
from agents.trainer import Trainer
from agents.unread import Job, check_settings
from textenv.config import NAMES
from textenv.training.files import locked, no_room, remove_unfinished, write_json


def build(
    config: TrainConfig, settings: Any, algorithm_config: Any, ranks: Ranks = ALONE
) -> tuple[Experiment, Trainer]:
    """The experiment for an environment, and a trainer at iteration 0."""
    experiment = domain_of(config.env).open(config, settings, ranks)
    _, algorithm = find_algorithm(config.algorithm)
    learner = algorithm(algorithm_config, experiment.network_factory)
    check_settings(Job(config, settings, algorithm_config, experiment, learner))
    experiment.network_factory.shard(learner.networks)
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
    tell_a_full_disk_once()
    with connected(config.rank_timeout) as ranks, ExitStack() as stack:
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not ranks.first)
        folder = ranks.lead(lambda: Path(config.run or default_folder(config)))  # the time is in its name
        if ranks.lead(lambda: restarted() and _has_begun(folder)):
            config = replace(config, run=str(folder), resume=True)
        if config.resume and ranks is ALONE:
            settings = _whole(settings)
        parts = config, settings, algorithm_config
        ranks.lead(lambda: _check_packages(config))
        if (summary := ranks.lead(lambda: _claim(folder, parts, stack))) is not None:
            console.print(f"the run in {folder}/ is finished, with {config.iterations} iterations.")
            return summary
        for line in ranks.lead(lambda: sizes.start_lines(*_located(folder, parts), ranks.count, folder)):
            console.print(line)
        in_step = settings != _whole(settings)  # ranks meet wherever sharded weights are made or read
        experiment, trainer = ranks.together(lambda: build(*_located(folder, parts), ranks), in_step)
        config, fingerprints = trainer.config, _agreed(experiment.fingerprints, ranks, "models and prompts")
        before = experiment.evaluate(trainer.algorithm.networks.policy)
        records = experiment.held_out_records(trainer, before)
        if config.resume:
            ranks.together(lambda: _restore(folder, trainer, fingerprints), in_step)
            _agreed(lambda: trainer.iteration, ranks, "checkpoints; all must see one run folder")
        ranks.lead(lambda: _open(folder, parts, experiment, fingerprints, stack))
        ranks.lead(lambda: _outline(folder, config, experiment, before))
        if not config.resume:
            checkpoint.save_checkpoint(folder, trainer, experiment.objective(before))
            ranks.lead(lambda: checkpoint.iterations_done(folder))  # raises if something in it cannot be read again
        tracked = trackers.Trackers(console.print)
        ranks.lead(lambda: _track(tracked, stack, folder, trainer, parts))
        source = describe_rates(config, has_adapters(settings))
        console.print(f"{_title(config)} {experiment.describe()}\n{source}\nresults in {folder}/")
        rows = _iterate(folder, console, experiment, trainer, tracked, records)
        summary = _write_results(folder, rows, experiment, trainer, tracked, before)
        if ranks.first:
            alarms = [f"look: {alarm}" for alarm in find_alarms(rows)]
            console.print("\n".join([*experiment.result_lines(summary, folder), *alarms]))
    return summary


def _check_packages(config: TrainConfig) -> None:
    """Raise ValueError if a package is missing that the run would need later."""
    trackers.check_installed(config.tracker)
    if config.dump_rollouts:
        dumps.check_installed(config.dump_format)


def _has_begun(folder: Path) -> bool:
    """Whether a run that torchrun starts again has a checkpoint. Without one, its folder is removed.

    A folder that another program has written, or another run, is neither.
    """
    if not run_folder.is_of_this_job(folder):
        return False
    if os.path.isfile(folder / checkpoint.FILE):
        return True
    shutil.rmtree(folder)
    return False


def _claim(folder: Path, parts: tuple[TrainConfig, Any, Any], stack: ExitStack) -> dict[str, Any] | None:
    """Refuse a folder that this run may not use; lock that of a resumed one. Returns the summary of a finished run."""
    if not parts[0].resume:
        return run_folder.check_new(folder)
    run_folder.check_same(folder, *parts)
    stack.enter_context(locked(folder))
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
    fingerprints: Mapping[str, str],
    stack: ExitStack,
) -> None:
    """Create the folder of a new run, with what it can be resumed from. From here on, errors say how to go on."""
    resume = parts[0].resume
    if resume:
        remove_unfinished(folder)
        checkpoint.remove_surplus(folder, parts[0].keep_checkpoints)
        run_folder.lengthen(folder, parts[0])
        (folder / report.SUMMARY).unlink(missing_ok=True)  # of what was reached before; the checkpoint may be earlier
    else:
        run_folder.create(folder)
    stack.enter_context(_resumable(folder, resume))
    if not resume:
        stack.enter_context(locked(folder))
        run_folder.save_config(folder, *parts, fingerprints)
        experiment.save_prompts(folder)


def _track(
    tracked: trackers.Trackers,
    stack: ExitStack,
    folder: Path,
    trainer: Trainer,
    parts: tuple[TrainConfig, Any, Any],
) -> None:
    """Open the trackers, until the run ends, and tell them its settings."""
    stack.enter_context(tracked)
    tracked.open(parts[0].tracker, folder, trainer.iteration)
    arguments = {f"env.{name}": value for name, value in parts[0].env_arguments(texts=NAMES).items()}
    settings = {name: value for part in parts for name, value in vars(part).items() if name != "env_arg"}
    tracked.configure(settings | arguments | report.machine(trainer.device))


def _outline(folder: Path, config: TrainConfig, experiment: Experiment, before: Any) -> None:
    outline = viewer.Outline(
        title=_title(config),
        seed=config.seed,
        iterations=config.iterations,
        panels=[viewer.describe_panel(panel) for panel in experiment.panels()],
        before=experiment.summarize(before),
    )
    viewer.write_outline(folder, outline)


def default_folder(config: TrainConfig) -> str:
    """The folder of a run without --run."""
    return f"runs/{config.env}-{config.algorithm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _reopen(folder: Path) -> tuple[Experiment, Algorithm]:
    config, settings, algorithm_config = run_folder.load_config(folder)
    config, settings = run_folder.located(folder, config, _whole(settings))
    experiment = domain_of(config.env).reopen(config, settings, folder)
    return experiment, find_algorithm(config.algorithm)[1](algorithm_config, experiment.network_factory)


def _whole(settings: Any) -> Any:
    """The settings of a run by several processes for one, which has all weights."""
    return replace(settings, shard="none") if isinstance(settings, TextConfig) else settings


def _finished(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the run, if it has nothing left to do."""
    if checkpoint.iterations_done(folder) < config.iterations:
        return None
    return report.finished_summary(folder, config.iterations)


def _iterate(
    folder: Path,
    console: Console,
    experiment: Experiment,
    trainer: Trainer,
    tracked: trackers.Trackers,
    before: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Train with checkpoints, and reports by the first rank. Returns the metrics that it has reported.

    before: held-out records before training.
    """
    if not trainer.ranks.first:
        for _ in trainer.iterate(experiment.watch):
            _save_when_due(folder, trainer, experiment)
        return []
    config, done = trainer.config, trainer.iteration
    scalars, records = report.Scalars(folder, done, config.iterations), RecordFile(folder, done)
    dumped = dumps.Dumps(folder, config.dump_rollouts, config.dump_format, done)
    tracked.reported = scalars.reported
    records.begin(before)
    if scalars.lost:
        console.print(f"metrics.jsonl was damaged: the metrics of {scalars.lost} iterations are lost.")
    with report.Bar(console, config.iterations, done) as bar:
        for iteration in trainer.iterate(experiment.watch):
            metrics = iteration.metrics | experiment.report_metrics(iteration.rollout)
            scalars.write(iteration.number, metrics)
            tracked.scalars(iteration.number, metrics)
            records.write(iteration.number, ROLLOUT, experiment.records(iteration.number, iteration.rollout))
            if dumped.due(iteration.number):
                dumped.write(iteration.number, experiment.dump_rows(iteration.rollout))
            bar.show(iteration.number, experiment.progress_line(metrics))
            for line in experiment.remarks(iteration.number, metrics):
                console.print(line)
            if _save_when_due(folder, trainer, experiment):
                viewer.write_page(folder, viewer.read_report(folder, running=True))
    return scalars.rows


def _save_when_due(folder: Path, trainer: Trainer, experiment: Experiment) -> bool:
    """Whether a checkpoint was due, and has been saved. Called by all ranks."""
    config, done = trainer.config, trainer.iteration
    due = done % config.checkpoint_every == 0 or done == config.iterations
    if due and config.keep_checkpoints == BEST:
        held_out = experiment.objective(experiment.evaluate(trainer.algorithm.networks.policy))
        checkpoint.save_checkpoint(folder, trainer, held_out)
    elif due:
        checkpoint.save_checkpoint(folder, trainer)
    return due


def _write_results(
    folder: Path,
    rows: list[dict[str, Any]],
    experiment: Experiment,
    trainer: Trainer,
    tracked: trackers.Trackers,
    before: Any,
) -> dict[str, Any]:
    """Evaluate, and write pictures, what the experiment writes, the page, and last of all the summary."""
    config, unit = trainer.config, experiment.collector.unit
    after = experiment.evaluate(trainer.algorithm.networks.policy)
    records = experiment.held_out_records(trainer, after)
    results = experiment.write_results(folder, trainer, (before, after), records)
    if not trainer.ranks.first:
        return {}
    RecordFile(folder, trainer.iteration).write(trainer.iteration, HELD_OUT, records)
    evaluations = experiment.summarize(before), experiment.summarize(after)
    title = f"{_title(config)}, seed {config.seed}"
    plots.draw_curves(folder / "curves.png", rows, title, experiment.panels(), *evaluations)
    summary = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed} | results
    summary |= {"iterations": trainer.iteration, unit: trainer.steps, "seconds": trainer.seconds}
    summary |= {f"{unit}_per_second": trainer.steps / max(trainer.seconds, 1e-9)}
    summary |= report.machine(trainer.device)
    tracked.results(trainer.iteration, sorted(folder.glob("*.png")), experiment.sample_rows(before, after))
    viewer.write_page(folder, replace(viewer.read_report(folder, running=False), summary=summary))
    write_json(folder / report.SUMMARY, summary)  # a run that has one is finished, and nothing is written again
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
        failed = isinstance(error, Exception) and stop_behind(error) is None
        if not resumed and (without_checkpoint or (failed and not reported)):
            shutil.rmtree(folder)
        elif not without_checkpoint:
            shown.add_note(
                f"The last checkpoint is good: continue from it with --run {shlex.quote(str(folder))} --resume."
            )
            # The page says how far it came, and no longer that it goes on. A signal meanwhile ends that alone: torchrun
            # sends one when it notices the failure too, and the run is ending anyway.
            with suppress(OSError, ValueError, KeyboardInterrupt):
                viewer.write_page(folder, viewer.read_report(folder, running=False))
        if shown is not error:
            raise shown from error
        raise
