"""A training run from start to finish: build, evaluate, train, evaluate again, and write the results to a folder."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from agents import checkpoint
from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.domains import domain_of
from agents.interfaces import Experiment
from agents.reporting import plots, report
from agents.trainer import Trainer


def build(config: TrainConfig, settings: Any, algorithm_config: Any) -> tuple[Experiment, Trainer]:
    """The experiment for an environment, and a trainer at iteration 0."""
    experiment = domain_of(config.env).open(config, settings)
    _, algorithm = find_algorithm(config.algorithm)
    return experiment, Trainer(config, algorithm(algorithm_config, experiment.network_factory), experiment.collector)


def load(folder: Path) -> tuple[Experiment, Trainer]:
    """Experiment and trainer as of the last checkpoint of the run in `folder`."""
    experiment, trainer = build(*checkpoint.load_config(folder))
    checkpoint.load_checkpoint(folder, trainer)
    return experiment, trainer


def train(config: TrainConfig, settings: Any, algorithm_config: Any) -> dict[str, Any]:
    """Train, write the results, and return the summary, which is also written to summary.json."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    folder = Path(config.run or default_folder(config))
    if config.resume:
        checkpoint.check_same(folder, config, settings, algorithm_config)
    elif folder.exists():
        checkpoint.refuse(folder)
    experiment, trainer = build(config, settings, algorithm_config)
    before = experiment.evaluate(trainer.algorithm.networks.policy)
    if config.resume:
        checkpoint.load_checkpoint(folder, trainer)
    else:
        checkpoint.save_config(folder, config, settings, algorithm_config)
        checkpoint.save_checkpoint(folder, trainer)  # the run can be resumed from here on
    title = f"{config.algorithm} on {config.env}"
    console.print(f"{title} {experiment.describe()}\nresults in {folder}/")
    with (
        _resumable(folder, config.resume),
        closing(report.Scalars(folder, trainer.iteration)) as scalars,
        report.Bar(console, config.iterations, trainer.iteration) as bar,
    ):
        for iteration in trainer.iterate():
            metrics = iteration.metrics | experiment.report_metrics(iteration.rollout)
            scalars.write(iteration.number, metrics)
            bar.show(iteration.number, experiment.progress_line(metrics))
            if iteration.number % config.checkpoint_every == 0 or iteration.number == config.iterations:
                checkpoint.save_checkpoint(folder, trainer)
    after = experiment.evaluate(trainer.algorithm.networks.policy)
    plots.draw_curves(folder / "curves.png", scalars.rows, f"{title}, seed {config.seed}", experiment.panels())
    summary = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed}
    summary |= experiment.write_results(folder, trainer, before, after)
    unit = experiment.collector.unit
    summary |= {"iterations": trainer.iteration, unit: trainer.steps, "seconds": trainer.seconds}
    summary |= {f"{unit}_per_second": trainer.steps / max(trainer.seconds, 1e-9)}
    summary |= report.machine(trainer.device)
    report.write_json(folder / "summary.json", summary)
    console.print("\n".join(experiment.result_lines(summary, folder)))
    return summary


@contextmanager
def _resumable(folder: Path, resumed: bool) -> Iterator[None]:
    """Add to any error how to resume the run. A new run that fails before its first report leaves no folder."""
    try:
        yield
    except BaseException as error:
        metrics = folder / "metrics.jsonl"
        reported = metrics.is_file() and metrics.stat().st_size > 0
        if not reported and not resumed and isinstance(error, Exception):
            shutil.rmtree(folder)
        else:
            quoted = shlex.quote(str(folder))
            error.add_note(f"The last checkpoint is good: continue from it with --run {quoted} --resume.")
        raise


def default_folder(config: TrainConfig) -> str:
    """The folder of a run without --run."""
    return f"runs/{config.env}-{config.algorithm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
