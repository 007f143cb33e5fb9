"""Run folders: a configuration that is written once, and checkpoints to go on from as if never stopped.

TorchRL's Checkpoint writes tensors and JSON, atomically, and no pickles.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint

from agents.algorithms import find_algorithm
from agents.config import TrainConfig
from agents.trainer import Trainer

NOT_COMPARED = {"run", "resume", "checkpoint_every", "micro_batch"}  # settings that do not change what is learned


def refuse(folder: Path) -> None:
    """Says that a run folder exists, and what to do."""
    raise ValueError(
        f"the run folder {str(folder)!r} exists already; choose another --run, or go on with it by --resume."
    )


def save_config(folder: Path, config: TrainConfig, algorithm_config: Any) -> None:
    """Makes the run's folder and writes config.json into it."""
    folder.mkdir(parents=True)
    text = json.dumps(
        {"train": dataclasses.asdict(config), "algorithm": dataclasses.asdict(algorithm_config)}, indent=2
    )
    (folder / "config.json").write_text(text + "\n")


def load_config(folder: Path) -> tuple[TrainConfig, Any]:
    """The configuration that a run was started with."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no run in {str(folder)!r} (no config.json); give the folder that training wrote.")
    stored = json.loads(path.read_text())
    train = stored["train"] | {"env_arg": tuple(stored["train"]["env_arg"]), "run": str(folder)}
    config = TrainConfig(**train)
    algorithm_class, _ = find_algorithm(config.algorithm)
    return config, algorithm_class(**stored["algorithm"])


def check_same(folder: Path, config: TrainConfig, algorithm_config: Any) -> None:
    """Refuses to resume a run under another configuration."""
    stored_config, stored_algorithm = load_config(folder)
    pairs = (
        [("algorithm", stored_config.algorithm, config.algorithm)]
        if stored_config.algorithm != config.algorithm
        else _differences(stored_config, config) + _differences(stored_algorithm, algorithm_config)
    )
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
    _checkpoint(trainer).load(folder / "checkpoint")


def _checkpoint(trainer: Trainer) -> Checkpoint:
    masks: Any = {f"mask_policy_{index}": mask.model for index, mask in enumerate(trainer.mask_policies)}
    return Checkpoint(actor=trainer.actor, critic=trainer.critic, optimizer=trainer.optimizer, trainer=trainer, **masks)


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(new) if field.name not in NOT_COMPARED]
    return [
        (name, getattr(old, name), getattr(new, name)) for name in names if getattr(old, name) != getattr(new, name)
    ]
