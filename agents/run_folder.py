"""The folder of a run: what it was started with, and who may write to it.

`config.json` holds the settings as they were given, the directory that relative names are read from, and fingerprints
of the models and prompts. A run folder is trusted like a program: its settings name functions that are imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.domains import domain_of
from agents.ranks import PARENT
from textenv.config import NAMES
from textenv.settings import check_new_folder
from textenv.task import PARTS, is_embedded
from textenv.training.files import write_json

JOB = "job"  # in config.json
# Settings that do not change what is learned, or that are checked apart.
NOT_COMPARED = {
    "run",
    "resume",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "decode_slots",
    "compile",
    "shard",
    "iterations",
    "rank_timeout",
    "tracker",
    "dump_rollouts",
    "dump_format",
    "keep_checkpoints",
}


def refuse(folder: Path) -> None:
    """Raise the ValueError for a run folder that already exists."""
    raise ValueError(
        f"the run folder {str(folder)!r} already exists; choose another --run, or continue it with --resume."
    )


def check_new(folder: Path) -> None:
    """Raise ValueError for a run folder that exists or cannot be created. Creates nothing."""
    if os.path.lexists(folder):
        refuse(folder)
    check_new_folder(folder, "--run")


def create(folder: Path) -> None:
    """Create the run folder. Raises ValueError if it cannot be created."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        refuse(folder)
    except OSError as error:
        raise ValueError(
            f"the run folder {str(folder)!r} cannot be created ({error}); choose another --run."
        ) from error


def save_config(
    folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any, fingerprints: Mapping[str, str]
) -> None:
    """Write config.json. fingerprints: of models and prompts, see `Experiment.fingerprints`."""
    parts = {"train": config, "settings": settings, "algorithm": algorithm_config}
    stored: dict[str, Any] = {name: dataclasses.asdict(part) for name, part in parts.items()}
    stored["directory"], stored["import_from"] = os.getcwd(), [name for name in sys.path if name in _added]
    write_json(folder / "config.json", stored | {"fingerprints": dict(fingerprints), JOB: _job()})


def is_of_this_job(folder: Path) -> bool:
    """Whether the processes of this torchrun have started the run in a folder: those that it has started again."""
    try:
        stored = _read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(stored, dict) and stored.get(JOB) is not None and stored[JOB] == _job()


def _job() -> str | None:
    """An id of the torchrun that has started this process, however often it does; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} {platform.node()} {PARENT}" if name == "none" else name  # "none" is what it says without an id


def load_config(folder: Path) -> tuple[TrainConfig, Any, Any]:
    """The configuration of a run: shared settings, the domain's and the algorithm's.

    Raises ValueError if there is none, or if this version cannot read it.
    """
    with _readable(folder):
        stored = _read(folder)
        train: dict[str, Any] = _tuples(stored["train"]) | {"run": str(folder)}
        config = TrainConfig(**train)
        for place in (stored["directory"], *stored.get("import_from", ())):
            _import_from(Path(place))
    domain = domain_of(config.env)  # imports the user's module, whose errors are not the file's
    with _readable(folder):
        settings, (algorithm_settings, _) = domain.settings, find_algorithm(config.algorithm)
        return config, settings(**_tuples(stored["settings"])), algorithm_settings(**_tuples(stored["algorithm"]))


def settings_of(source: Path) -> tuple[TrainConfig, Any, Any]:
    """The settings of a run for a new one like it, with names of files located: see `located`.

    source: a run folder, or its config.json, which may lie elsewhere under another name.
    """
    if not os.path.exists(source):
        raise ValueError(f"no configuration at {str(source)!r}; --config takes a run folder, or its config.json.")
    config, settings, algorithm_config = load_config(source)
    config, settings = located(source, config, settings)
    return dataclasses.replace(config, run=None, resume=False), settings, algorithm_config


def check_same(folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Raise ValueError if a run was started with another configuration.

    `NOT_COMPARED` settings may differ. `iterations` may grow, unless the learning rates were scheduled by it.
    """
    stored, current = load_config(folder), (config, settings, algorithm_config)
    pairs = [
        (name, getattr(stored[0], name), getattr(config, name))
        for name in ("env", "algorithm")
        if getattr(stored[0], name) != getattr(config, name)
    ] or [pair for old, new in zip(stored, current, strict=True) for pair in _differences(old, new)]
    if pairs:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in pairs)
        raise ValueError(
            f"the run in {str(folder)!r} was started with another configuration: {listed}. Resume it without "
            "these flags, or start a new run."
        )
    _check_iterations(folder, stored[0], config)


def lengthen(folder: Path, config: TrainConfig) -> None:
    """Write a larger number of iterations into config.json, so that it counts from now on."""
    stored = _read(folder)
    if stored["train"]["iterations"] != config.iterations:
        stored["train"]["iterations"] = config.iterations
        write_json(folder / "config.json", stored)


def changed(folder: Path, fingerprints: Mapping[str, str]) -> list[str]:
    """What is not what it was when the run started, by the names of its fingerprints."""
    with _readable(folder):
        stored = _read(folder)["fingerprints"]
        return sorted(
            name for name in stored.keys() | fingerprints.keys() if stored.get(name) != fingerprints.get(name)
        )


def check_unchanged(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Raise ValueError if a model or the prompts are not those that the run was started with."""
    if names := changed(folder, fingerprints):
        raise ValueError(
            f"the run in {str(folder)!r} was started with another content of: {', '.join(names)}. Their names are the "
            "same, but a file or a function behind them has changed; restore it, or start a new run."
        )


def located(folder: Path, config: TrainConfig, settings: Any) -> tuple[TrainConfig, Any]:
    """The settings with names of files that exist only where the run was started made absolute."""
    directory = Path(_read(folder)["directory"])
    arguments = config.env_arguments(texts=NAMES)
    found = {name: _found(arguments[name], directory) for name in PARTS if name in arguments}
    changed = {name: json.dumps(value) for name, value in found.items() if value != arguments[name]}
    held_out = getattr(settings, "held_out", None)
    if held_out is not None:
        settings = dataclasses.replace(settings, held_out=_found(held_out, directory))
    return config.with_env_arg(changed), settings


def _found(name: Any, directory: Path) -> Any:
    if isinstance(name, Mapping):
        return {_found(key, directory): weight for key, weight in name.items()}
    if (
        not isinstance(name, str)
        or not name
        or is_embedded(name)
        or os.path.exists(name)
        or not os.path.exists(directory / name)
    ):
        return name
    return str(directory / name)


_added: set[str] = set()  # to sys.path; a run like another one (--config) needs that one's functions later too


def _import_from(directory: Path) -> None:
    """Let functions be imported from where the run was started; the present directory comes first."""
    if os.path.isdir(directory) and str(directory) not in sys.path:
        sys.path.append(str(directory))
        _added.add(str(directory))


def _check_iterations(folder: Path, old: TrainConfig, new: TrainConfig) -> None:
    if new.iterations < old.iterations:
        raise ValueError(
            f"the run in {str(folder)!r} has {old.iterations} iterations, which can only grow, got --iterations "
            f"{new.iterations}; leave it out."
        )
    if new.iterations > old.iterations and old.schedule == "linear":
        raise ValueError(
            f"the learning rates of the run in {str(folder)!r} fall linearly to zero at iteration {old.iterations}: "
            f"with --iterations {new.iterations} all of them would have been others. Start a new run, with --schedule "
            "constant if it may be lengthened."
        )


def _read(folder: Path) -> dict[str, Any]:
    path = _path(folder)
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        actor = str(folder / "actor")
        other = f" {actor!r} is a model that another command wrote: best-of-n --model samples from it, and measures it."
        hint = other if os.path.isfile(os.path.join(actor, "config.json")) else ""
        raise ValueError(f"no run in {str(folder)!r} (no config.json); pass a run folder written by train.{hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: of brackets in brackets
        raise _unreadable(folder, error) from error


def _path(folder: Path) -> Path:
    """The configuration of a run folder, or the file itself."""
    return folder if os.path.isfile(folder) else folder / "config.json"


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn the errors of a damaged configuration into a ValueError with the remedy."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{str(_path(folder))!r} is not a configuration that this version can read ({error}); start a new run."
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists of JSON back to the tuples of the configurations."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(new) if field.name not in NOT_COMPARED]
    pairs = [(name, _compared(old, name), _compared(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _compared(config: Any, name: str) -> Any:
    """The value to compare. Environment arguments are compared parsed: order and repeats do not matter."""
    return config.env_arguments() if name == "env_arg" else getattr(config, name)
