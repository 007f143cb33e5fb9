"""The checkpoint of a run: one file, from which the run resumes exactly and its policy is restored.

The file is written anew and renamed, and tensors go through ordinary writes: a kill or a full disk leaves the last
checkpoint as it was. Tensors are read to the CPU and copied from there to where they belong, so the device they were
saved on need not exist. `torch.load` reads it without running code (`weights_only`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from agents.interfaces import Algorithm, Collector
from agents.reporting.files import replacing
from agents.trainer import Trainer

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Replace the checkpoint of a run with the current state of the trainer. Raises OSError where the disk is full."""
    networks, collector = trainer.algorithm.networks, trainer.collector
    state = {
        "iteration": trainer.iteration,
        "device": trainer.device.type,
        "policy": networks.policy.state_dict(),  # also among `trained`; a tensor's bytes are written once
        "trained": _states(networks.trained),
        "targets": _states(networks.targets),
        "collector_modules": _states(collector.modules),
        "trainer": trainer.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }
    with replacing(folder / FILE) as file:
        torch.save(state, file)


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Restore a trainer to resume its run. Raises ValueError if there is no checkpoint or it does not fit.

    It does not fit another kind of device either: random numbers there cannot be continued here.
    """
    state = _read(folder, mmap=trainer.device.type != "cpu")  # an optimizer on the CPU keeps the tensors it is given
    if state["device"] != trainer.device.type:
        raise ValueError(
            f"the run in {str(folder)!r} was trained on {state['device']} and would go on on {trainer.device.type}, "
            "with other random numbers; resume it on a machine like the first, or evaluate and generate here."
        )
    with _fitting(folder):
        _load_networks(state, trainer.algorithm, trainer.collector)
        trainer.load_state_dict(state["trainer"])
        trainer.optimizer.load_state_dict(state["optimizer"])


def load_policy(folder: Path, algorithm: Algorithm, collector: Collector) -> nn.Module:
    """Restore what acts: the policy, models of the collector, running statistics. Returns the policy.

    Reads nothing else from the disk, and builds no other network. On any device.
    """
    state = _read(folder, mmap=True)
    with _fitting(folder):
        algorithm.networks.policy.load_state_dict(state["policy"])
        _load_states(collector.modules, state["collector_modules"])
        collector.load_statistics(state["trainer"]["collector"])
    return algorithm.networks.policy


def load_networks(folder: Path, algorithm: Algorithm, collector: Collector) -> None:
    """Restore all networks and running statistics, but nothing that only training needs. On any device."""
    state = _read(folder, mmap=True)
    with _fitting(folder):
        _load_networks(state, algorithm, collector)
        collector.load_statistics(state["trainer"]["collector"])


def iterations_done(folder: Path) -> int:
    """Iterations that the checkpoint of a run has behind it."""
    return int(_read(folder, mmap=True)["iteration"])


def _read(folder: Path, mmap: bool) -> dict[str, Any]:
    """mmap: read tensors when they are copied, for callers that copy a few; they must not keep them."""
    if not os.path.isfile(folder / FILE):
        raise ValueError(f"no checkpoint in {str(folder)!r}: the run stopped before its first one; start a new run.")
    with _fitting(folder):
        return torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=mmap)


def _states(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {name: module.state_dict() for name, module in modules.items()}


def _load_states(modules: Mapping[str, nn.Module], states: dict[str, Any]) -> None:
    for name, module in modules.items():
        module.load_state_dict(states[name])


def _load_networks(state: dict[str, Any], algorithm: Algorithm, collector: Collector) -> None:
    _load_states(algorithm.networks.trained, state["trained"])
    _load_states(algorithm.networks.targets, state["targets"])
    _load_states(collector.modules, state["collector_modules"])


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn errors of reading and restoring into a ValueError with the remedy."""
    try:
        yield
    except (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
        raise ValueError(
            f"the checkpoint in {str(folder)!r} does not fit this trainer: {error}. Use the same models, prompts and "
            "versions as before, or start a new run."
        ) from error
