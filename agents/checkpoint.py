"""Run folders: a configuration, written once, and checkpoints from which a run resumes exactly.

TorchRL's Checkpoint writes tensors and JSON atomically, without pickles.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig
from agents.domains import domain_of
from agents.trainer import Trainer

NOT_COMPARED = {"run", "resume", "micro_batch_size"}  # settings that do not change what is learned


def refuse(folder: Path) -> None:
    """Raise the ValueError for a run folder that already exists."""
    raise ValueError(
        f"the run folder {str(folder)!r} already exists; choose another --run, or continue it with --resume."
    )


def save_config(folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Create the run folder and write config.json into it. Raises ValueError if it cannot be created."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"the run folder {str(folder)!r} cannot be created ({error}); choose another --run."
        ) from error
    parts = {"train": config, "settings": settings, "algorithm": algorithm_config}
    text = json.dumps({name: dataclasses.asdict(part) for name, part in parts.items()}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def load_config(folder: Path) -> tuple[TrainConfig, Any, Any]:
    """The configuration of a run: shared settings, the domain's and the algorithm's.

    Raises ValueError if there is none, or if this version cannot read it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no run in {str(folder)!r} (no config.json); pass a run folder written by train.")
    try:
        stored = json.loads(path.read_text())
        train: dict[str, Any] = _tuples(stored["train"]) | {"run": str(folder)}
        config = TrainConfig(**train)
        settings, (algorithm_settings, _) = domain_of(config.env).settings, find_algorithm(config.algorithm)
        return config, settings(**_tuples(stored["settings"])), algorithm_settings(**_tuples(stored["algorithm"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a configuration that this version can read ({error}); start a new run."
        ) from error


def check_same(folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Raise ValueError if a run was started with another configuration; `NOT_COMPARED` settings may differ."""
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


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Replace the checkpoint of a run with the current state of the trainer."""
    _checkpoint(trainer).save(folder / "checkpoint")


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Restore a trainer from the checkpoint of a run. Raises ValueError if there is none or it does not fit."""
    if not (folder / "checkpoint").exists():
        raise ValueError(f"no checkpoint in {str(folder)!r}: the run stopped before its first one; start a new run.")
    try:
        _checkpoint(trainer).load(folder / "checkpoint")
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint in {str(folder)!r} does not fit this trainer: {error}. Use the same models, prompts and "
            "versions as before, or start a new run."
        ) from error


def _checkpoint(trainer: Trainer) -> Checkpoint:
    parts: Any = {
        **trainer.algorithm.networks.trained,
        **{f"target_{name}": module for name, module in trainer.algorithm.networks.targets.items()},
        **trainer.collector.modules,
    }
    return Checkpoint(optimizer=trainer.optimizer, trainer=trainer, **parts)


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
