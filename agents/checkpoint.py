"""Run folders: a configuration that is written once, and checkpoints to go on from as if never stopped.

TorchRL's Checkpoint writes tensors and JSON, atomically, and no pickles.
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
    """Says that a run folder exists, and what to do."""
    raise ValueError(
        f"the run folder {str(folder)!r} exists already; choose another --run, or go on with it by --resume."
    )


def save_config(folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Makes the run's folder and writes config.json into it."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"the run folder {str(folder)!r} cannot be made ({error}); choose another --run.") from error
    parts = {"train": config, "settings": settings, "algorithm": algorithm_config}
    text = json.dumps({name: dataclasses.asdict(part) for name, part in parts.items()}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def load_config(folder: Path) -> tuple[TrainConfig, Any, Any]:
    """The configuration that a run was started with: the shared part, the domain's and the algorithm's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no run in {str(folder)!r} (no config.json); give the folder that training wrote.")
    try:
        stored = json.loads(path.read_text())
        train: dict[str, Any] = _tuples(stored["train"]) | {"run": str(folder)}
        config = TrainConfig(**train)
        settings, (algorithm_settings, _) = domain_of(config.env).settings, find_algorithm(config.algorithm)
        return config, settings(**_tuples(stored["settings"])), algorithm_settings(**_tuples(stored["algorithm"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no configuration that this version reads ({error}); start a new run."
        ) from error


def check_same(folder: Path, config: TrainConfig, settings: Any, algorithm_config: Any) -> None:
    """Refuses to resume a run under another configuration."""
    stored, given = load_config(folder), (config, settings, algorithm_config)
    pairs = [
        (name, getattr(stored[0], name), getattr(config, name))
        for name in ("env", "algorithm")
        if getattr(stored[0], name) != getattr(config, name)
    ] or [pair for old, new in zip(stored, given, strict=True) for pair in _differences(old, new)]
    if pairs:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in pairs)
        raise ValueError(
            f"the run in {str(folder)!r} was started with another configuration: {listed}. Resume it with its own "
            "settings, or start a new run."
        )


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Replaces the run's checkpoint by the trainer's present state."""
    _checkpoint(trainer).save(folder / "checkpoint")


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Puts the trainer where the run's checkpoint left off."""
    if not (folder / "checkpoint").exists():
        raise ValueError(f"no checkpoint in {str(folder)!r}: the run stopped before its first; start a new one.")
    try:
        _checkpoint(trainer).load(folder / "checkpoint")
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint in {str(folder)!r} does not fit what the run would go on with: {error}. Give it the same "
            "models, prompts and versions as before, or start a new run."
        ) from error


def _checkpoint(trainer: Trainer) -> Checkpoint:
    parts: Any = {
        **trainer.algorithm.networks.trained,
        **{f"target_{name}": module for name, module in trainer.algorithm.networks.targets.items()},
        **trainer.collector.modules,
    }
    return Checkpoint(optimizer=trainer.optimizer, trainer=trainer, **parts)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where configurations have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(new) if field.name not in NOT_COMPARED]
    pairs = [(name, _compared(old, name), _compared(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _compared(config: Any, name: str) -> Any:
    """What a setting means: arguments of the environment may come twice, or in another order."""
    return config.env_arguments() if name == "env_arg" else getattr(config, name)
