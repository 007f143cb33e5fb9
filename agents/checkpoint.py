"""The checkpoint of a run, from which the run resumes exactly and its policy is restored.

It is one file, which is written anew and renamed: a kill or a full disk leaves the last checkpoint as it was. Where
weights are sharded, every rank writes its part of them (`torch.distributed.checkpoint`) to a folder beside the file,
which is named in the file once it is whole. Either kind opens under any number of ranks, sharded or not.

With `keep_checkpoints` above 1 the last ones stay beside it, as `checkpoint-ITERATION.pt`, of which it is the last.
With "best" these are the last one and the best.

Tensors are read to the CPU and copied from there to where they belong, so the device they were saved on need not exist.
`torch.load` reads the file without running code (`weights_only`). The folder beside it is not as safe: PyTorch reads
its list of contents as a pickle.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from agents.config import BEST
from agents.interfaces import Algorithm, Collector
from agents.trainer import Trainer
from textenv.training.files import no_room, replacing

FILE = "checkpoint.pt"
# What a checkpoint that is damaged, or of another trainer, may raise.
UNFIT = (
    *(OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError),
    *(AssertionError, struct.error, UnpicklingError, CheckpointException),
)
PARTS = "checkpoint-"  # what the folders of sharded weights are called, before their iteration
NUMBERED = re.compile(rf"{PARTS}(\d+)(?:\.pt)?")  # such a folder, or a checkpoint that is kept


def save_checkpoint(folder: Path, trainer: Trainer, held_out: float | None = None) -> None:
    """Replace the checkpoint of a run with the current state of the trainer. Raises OSError where the disk is full.

    All ranks call it; the first one writes the file. held_out: how good the policy is, where the best one is kept.
    """
    if not (trainer.ranks.first or trainer.collector.in_step):
        return
    networks, tensors = trainer.algorithm.networks, _tensors(trainer.algorithm, trainer.collector)
    tensors |= _optimizer_tensors(trainer)
    parts = f"{PARTS}{trainer.iteration}" if trainer.collector.in_step else None
    if parts is not None:
        _save_parts(folder / parts, tensors)
    if not trainer.ranks.first:
        return
    state = {
        "iteration": trainer.iteration,
        "held_out": held_out,
        "device": trainer.device.type,
        "policy": _policy(networks),
        "trainer": trainer.state_dict(),
        "parts": parts,
        "tensors": {} if parts else tensors,
    }
    keep = trainer.config.keep_checkpoints
    own = folder / (FILE if keep == 1 else f"{PARTS}{trainer.iteration}.pt")
    with replacing(own) as file:
        torch.save(state, file)
    if keep != 1:  # a copy and no link: who copies another one over it must not change this one
        with replacing(folder / FILE) as file, own.open("rb") as source:
            shutil.copyfileobj(source, file)
    _remove_old(folder, trainer.iteration, keep)


def remove_surplus(folder: Path, keep: int | str) -> None:
    """Remove the checkpoints that a process has left which was killed before it removed them itself."""
    _remove_old(folder, iterations_done(folder), keep)


def _remove_old(folder: Path, last: int, keep: int | str) -> None:
    """Keep the last checkpoint and those before it, `keep` in all, or the best of them.

    Later ones are removed: a run that goes on from an earlier checkpoint writes them again.
    """
    numbered = {path: int(match[1]) for path in folder.iterdir() if (match := NUMBERED.fullmatch(path.name))}
    earlier = sorted({number for path, number in numbered.items() if path.suffix and number < last})
    if keep == BEST:
        kept = [max([*earlier, last], key=lambda number: _held_out(folder / f"{PARTS}{number}.pt")), last]
    else:
        kept = [*earlier, last][-int(keep) :]
    for path, number in numbered.items():
        if number not in kept and path.is_dir():
            shutil.rmtree(path)
        elif path.suffix and (number not in kept or keep == 1):
            path.unlink()


def _held_out(file: Path) -> float:
    """How good the policy of a checkpoint was on held-out prompts; least of all where that cannot be read."""
    try:
        return float(torch.load(file, mmap=True, weights_only=True)["held_out"])
    except UNFIT:  # TypeError: it was not measured
        return -math.inf


def load_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Restore a trainer to resume its run. Raises ValueError if there is no checkpoint or it does not fit.

    It does not fit another kind of device either: random numbers there cannot be continued here.
    """
    saved = _Saved(folder, mmap=trainer.device.type != "cpu")  # generators and replay keep the tensors they are given
    with _fitting(folder):
        device = saved.state["device"]
    if device != trainer.device.type:
        raise ValueError(
            f"the run in {str(folder)!r} was trained on {device} and would go on on {trainer.device.type}, "
            "with other random numbers; resume it on a machine like the first, or evaluate and generate here."
        )
    with _fitting(folder):
        trainer.load_state_dict(saved.state["trainer"])
        if trainer.iteration != (done := saved.iteration()):
            raise ValueError(f"it is of iteration {done}, and its trainer of {trainer.iteration}")
        saved.fill(_tensors(trainer.algorithm, trainer.collector) | _new_optimizer_tensors(trainer, saved.names()))


def load_policy(folder: Path, algorithm: Algorithm, collector: Collector) -> nn.Module:
    """Restore what acts: the policy, models of the collector, running statistics. Returns the policy.

    Reads nothing else from the disk, and builds no other network. On any device.
    """
    saved, policy = _Saved(folder, mmap=True), algorithm.networks.policy
    with _fitting(folder):
        saved.fill(_named(saved.state["policy"], policy) | _of_collector(collector), some=True)
        collector.load_statistics(saved.state["trainer"]["collector"])
    return policy


def load_networks(folder: Path, algorithm: Algorithm, collector: Collector) -> None:
    """Restore all networks and running statistics, but nothing that only training needs. On any device."""
    saved = _Saved(folder, mmap=True)
    with _fitting(folder):
        saved.fill(_tensors(algorithm, collector), some=True)
        collector.load_statistics(saved.state["trainer"]["collector"])


def iterations_done(folder: Path) -> int:
    """Iterations that the checkpoint of a run has behind it."""
    saved = _Saved(folder, mmap=True)
    with _fitting(folder):
        return saved.iteration()


class _Saved:
    """A checkpoint on the disk."""

    def __init__(self, folder: Path, mmap: bool) -> None:
        """mmap: read tensors when they are copied, for callers that copy a few; they must not keep them."""
        if not os.path.isfile(folder / FILE):
            raise ValueError(
                f"no checkpoint in {str(folder)!r}: the run stopped before its first one; start a new run."
            )
        with _fitting(folder):
            for _ in range(2):  # a run that goes on replaces the file, and then removes what the old one has named
                self.state: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=mmap)
                if not isinstance(self.state, dict):
                    raise TypeError(f"it holds a {type(self.state).__name__}")
                self.parts = None if self.state["parts"] is None else folder / self.state["parts"]
                if self.parts is None or self.parts.is_dir():
                    break

    def iteration(self) -> int:
        """Iterations behind it. Raises ValueError where that is no count."""
        if type(done := self.state["iteration"]) is not int or done < 0:
            raise ValueError(f"its iteration is {done!r}")
        return done

    def names(self) -> list[str]:
        """The names of all tensors."""
        if self.parts is None:
            return list(self.state["tensors"])
        return list(FileSystemReader(self.parts).read_metadata().state_dict_metadata)

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor], some: bool = False) -> None:
        """Copy tensors from the checkpoint. Raises KeyError or ValueError where names or shapes differ.

        some: the checkpoint may have others too.
        """
        if self.parts is not None and not self.parts.is_dir():
            raise ValueError(f"{str(self.parts)!r} is missing")
        names = set(self.names())
        if strange := tensors.keys() - names or (set() if some else names - tensors.keys()):
            raise KeyError(f"{len(strange)} names are not in both, such as {min(strange)}")
        if self.parts is not None:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process reads it
                load(dict(tensors), checkpoint_id=self.parts, no_dist=not dist.is_initialized())
            return
        for name, tensor in tensors.items():
            source = self.state["tensors"][name]
            if source.shape != tensor.shape:
                raise ValueError(f"{name} has the shape {tuple(source.shape)}, here {tuple(tensor.shape)}")
            if isinstance(tensor, DTensor):  # all ranks read the file, and keep a part each
                whole = source.to(tensor.device, tensor.dtype)
                source = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(source)


def _save_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((full for each in causes if (full := no_room(each))), causes[0]) from error


def _policy(networks: Any) -> str:
    """What the names of the policy's tensors begin with: it is one of the trained networks, or by itself."""
    found = (f"trained.{name}" for name, network in networks.trained.items() if network is networks.policy)
    return next(found, "policy")


def _tensors(algorithm: Algorithm, collector: Collector) -> dict[str, Tensor]:
    """Weights and buffers by name, to be written or filled in place."""
    networks = algorithm.networks
    tensors = _of_collector(collector)
    for kind, modules in (("trained", networks.trained), ("targets", networks.targets)):
        for name, module in modules.items():
            tensors |= _named(f"{kind}.{name}", module)
    return tensors | ({} if _policy(networks) != "policy" else _named("policy", networks.policy))


def _of_collector(collector: Collector) -> dict[str, Tensor]:
    modules: Mapping[str, nn.Module] = collector.modules
    return {name: tensor for key in modules for name, tensor in _named(f"collector.{key}", modules[key]).items()}


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state, by network, weight and kind. Weights that never had a gradient have none."""
    return {
        f"optimizer.{name}.{kind}": value
        for name, weight in _weights(trainer)
        for kind, value in trainer.optimizer.state.get(weight, {}).items()
        if isinstance(value, Tensor)
    }


def _new_optimizer_tensors(trainer: Trainer, names: list[str]) -> dict[str, Tensor]:
    """State for these names in the optimizer, to be filled: tensors like the weight, or numbers of steps."""
    trainer.optimizer.state.clear()
    for name, weight in _weights(trainer):
        prefix = f"optimizer.{name}."
        for kind in (each.removeprefix(prefix) for each in names if each.startswith(prefix)):
            fresh = torch.zeros((), device=weight.device) if kind == "step" else torch.zeros_like(weight)
            trainer.optimizer.state[weight][kind] = fresh
    return _optimizer_tensors(trainer)


def _weights(trainer: Trainer) -> Iterator[tuple[str, nn.Parameter]]:
    for name, network in trainer.algorithm.networks.trained.items():
        for weight_name, weight in network.named_parameters():
            yield f"{name}.{weight_name}", weight


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn errors of reading and restoring into a ValueError with the remedy."""
    try:
        yield
    except UNFIT as error:
        raise ValueError(
            f"the checkpoint in {str(folder)!r} does not fit this trainer: {error}. Use the same models, prompts and "
            "versions as before, or start a new run."
        ) from error
