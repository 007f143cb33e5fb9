"""The services that trackers write to: TensorBoard, trackio, Weights & Biases and MLflow.

Each is a `Tracker` over a logger of `torchrl.record`, which it extends where a run must go on, and where pictures and
tables are to be shown. Their packages are imported when one is opened: all but TensorBoard are extras.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchrl.record.loggers.mlflow import MLFlowLogger
from torchrl.record.loggers.tensorboard import TensorboardLogger

PROJECT = "textenv"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another

Table = Sequence[Mapping[str, Any]]  # rows with the same columns


@dataclass(frozen=True)
class Place:
    """What a tracker is opened with."""

    folder: Path  # of the run
    resume_at: int  # the iteration of the checkpoint that the run goes on from; 0: a new run
    identity: str | None  # by which the service knows this run; None: it does not know it

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """The run at one service. Its methods may raise anything."""

    @property
    def identity(self) -> str | None:
        """By which the service knows the run after --resume; None where it needs none."""
        ...

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings: numbers, texts, truth values, None, and lists and dicts of them."""
        ...

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an iteration."""
        ...

    def table(self, iteration: int, name: str, rows: Table) -> None:
        """Keep a table."""
        ...

    def picture(self, iteration: int, name: str, path: Path) -> None:
        """Keep a PNG file."""
        ...

    def close(self, failed: bool) -> None:
        """Send what is left. failed: the run ends by an error or a signal."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    identity = None

    def __init__(self, place: Place) -> None:
        self.logger = _PurgedLogger(place)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """As a text."""
        lines = json.dumps(settings, indent=2, default=str).splitlines()
        self.logger.experiment.add_text("settings", "\n".join(f"    {line}" for line in lines))  # Markdown's code

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """As scalars."""
        self.logger.log_metrics(dict(metrics), step=iteration)

    def table(self, iteration: int, name: str, rows: Table) -> None:
        """As a text with a table of Markdown."""
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self.logger.experiment.add_text(name, text, iteration)

    def picture(self, iteration: int, name: str, path: Path) -> None:
        """As an image."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.logger.experiment.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """Flush everything to disk."""
        self.logger.experiment.close()


class _PurgedLogger(TensorboardLogger):
    """TorchRL's logger, which purges what a resumed run had written after its last checkpoint."""

    def __init__(self, place: Place) -> None:
        self.purge_step = place.resume_at + 1
        super().__init__("tensorboard", log_dir=str(place.folder))

    def _create_experiment(self) -> SummaryWriter:
        return SummaryWriter(os.path.join(self.log_dir, self.exp_name), purge_step=self.purge_step)


class Wandb:
    """Weights & Biases. Offline in RUN/wandb, unless there is a login; WANDB_MODE decides otherwise."""

    def __init__(self, place: Place) -> None:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # otherwise in the home folder
            os.environ.setdefault(name, str(place.folder.resolve() / "wandb" / "cache"))
        import wandb
        from torchrl.record.loggers.wandb import WandbLogger

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        self.identity = place.identity or uuid.uuid4().hex[:8]
        self.logger = WandbLogger(
            place.name,
            save_dir=str(place.folder),
            id=self.identity,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            log_env_packages=False,
            mode=mode,
            settings=wandb.Settings(console="off"),  # the terminal is the progress bar's
        )

    def configure(self, settings: Mapping[str, Any]) -> None:
        """As the run's config."""
        self.logger.log_hparams(dict(settings))

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """As history."""
        self.logger.log_metrics(dict(metrics), step=iteration, override_global_step=True)

    def table(self, iteration: int, name: str, rows: Table) -> None:
        """As a table, in the last row of the history."""
        import wandb

        data = [list(row.values()) for row in rows]
        self._log_last(iteration, {name: wandb.Table(columns=list(rows[0]), data=data)})

    def picture(self, iteration: int, name: str, path: Path) -> None:
        """As an image, in the last row of the history."""
        import wandb

        self._log_last(iteration, {name: wandb.Image(str(path))})

    def _log_last(self, iteration: int, values: dict[str, Any]) -> None:
        """The service takes no rows before its last one, which may be sealed where a run goes on with only this."""
        run = self.logger.experiment
        run.log(values, step=max(iteration, run.step))

    def close(self, failed: bool) -> None:
        """Wait until everything is sent."""
        self.logger.experiment.finish(exit_code=int(failed))


class Trackio:
    """Trackio, in RUN/trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say otherwise."""

    def __init__(self, place: Place) -> None:
        _import_trackio(place.folder.resolve() / "trackio")
        from torchrl.record.loggers.trackio import TrackioLogger

        resume = "never" if place.identity is None else "must"
        self.logger = TrackioLogger(place.identity or place.name, PROJECT, resume=resume)
        self.identity: str | None = self.logger.experiment.name

    def configure(self, settings: Mapping[str, Any]) -> None:
        """As the run's config."""
        self.logger.log_hparams(dict(settings))

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """As metrics."""
        self.logger.experiment.log(dict(metrics), step=iteration)

    def table(self, iteration: int, name: str, rows: Table) -> None:
        """As a table."""
        import trackio

        data = [list(row.values()) for row in rows]
        self.logger.experiment.log({name: trackio.Table(columns=list(rows[0]), data=data)}, step=iteration)

    def picture(self, iteration: int, name: str, path: Path) -> None:
        """As an image."""
        import trackio

        self.logger.experiment.log({name: trackio.Image(path)}, step=iteration)

    def close(self, failed: bool) -> None:
        """Wait until everything is written."""
        import trackio

        trackio.finish()


def _import_trackio(folder: Path) -> None:
    """Import trackio so that it writes to `folder`, unless TRACKIO_DIR says otherwise.

    Raises ValueError if it was imported with another folder, which it keeps until the process ends.
    """
    if "TRACKIO_DIR" in os.environ:
        return
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        from trackio import utils
    finally:
        del os.environ["TRACKIO_DIR"]
    if Path(utils.TRACKIO_DIR) != folder:
        raise ValueError(
            f"it writes to {str(utils.TRACKIO_DIR)!r} until this process ends; set TRACKIO_DIR for all runs, or start "
            "each in a process of its own"
        )


class MLflow:
    """MLflow, in RUN/mlflow: a database and artifacts. MLFLOW_TRACKING_URI names another store or server."""

    def __init__(self, place: Place) -> None:
        self.logger = _ContinuedLogger(place)
        self.identity: str | None = self.logger.experiment.info.run_id

    def configure(self, settings: Mapping[str, Any]) -> None:
        """As parameters, which never change, and as the artifact settings.json, which is the latest."""
        import mlflow

        known = mlflow.get_run(self.identity).data.params
        mlflow.log_params({name: value for name, value in settings.items() if name not in known})
        mlflow.log_text(json.dumps(settings, indent=2, default=str), "settings.json")

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """As metrics. Names of rewards may have characters and slashes that MLflow refuses."""
        named = {_path_like(name): value for name, value in metrics.items()}
        self.logger.log_metrics(named, step=iteration)

    def table(self, iteration: int, name: str, rows: Table) -> None:
        """As a table of the artifacts."""
        import mlflow

        columns = {column: [row[column] for row in rows] for column in rows[0]}
        mlflow.log_table(columns, f"{name}-{iteration:05d}.json")

    def picture(self, iteration: int, name: str, path: Path) -> None:
        """As an artifact."""
        import mlflow

        mlflow.log_artifact(str(path), "pictures")

    def close(self, failed: bool) -> None:
        """Say how the run has ended, and leave MLflow as it was: it holds one run and one store for the process."""
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
        if self.logger.local:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


class _ContinuedLogger(MLFlowLogger):
    """TorchRL's logger, which goes on with the run that it had begun."""

    def __init__(self, place: Place) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # otherwise it writes to the home folder, and calls
        store = os.environ.get("MLFLOW_TRACKING_URI")
        self.local, self.place = store is None, place
        here, artifacts = place.folder.resolve() / "mlflow", None
        if store is None:
            here.mkdir(exist_ok=True)
            store, artifacts = f"sqlite:///{here / 'mlflow.db'}", (here / "artifacts").as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        super().__init__(name, store, artifact_location=artifacts)

    def _create_experiment(self) -> Any:
        import mlflow

        experiment = mlflow.get_experiment_by_name(self._mlflow_kwargs["name"])
        self.id = mlflow.create_experiment(**self._mlflow_kwargs) if experiment is None else experiment.experiment_id
        name = None if self.place.identity else self.place.name
        return mlflow.start_run(self.place.identity, experiment_id=self.id, run_name=name)


def _cell(value: Any) -> str:
    """A cell of a Markdown table."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _path_like(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`, without empty parts."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("/.")


KINDS: dict[str, Callable[[Place], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}
