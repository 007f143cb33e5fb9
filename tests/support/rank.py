"""One process of a few that learn together: `python -m tests.support.rank JOB`, with torchrun's environment.

JOB: a file of `torch.save` with `settings`, the arguments of the task, `cases`, and the `output` folder. The process
writes what came of every case to `output/INDEX.pt`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agents import run
from agents.presets import defaults
from agents.ranks import Ranks, connected
from agents.trainer import Trainer
from tests.support.learning import make_trainer, weights

CONTROL = dict(iterations=2, minibatch_size=8, checkpoint_every=100, num_envs=3, steps=8, hidden=(8,), gradient_steps=2)


def trainer_of(settings: Mapping[str, Any], case: Mapping[str, Any], ranks: Ranks) -> Trainer:
    """The trainer of a case, whose steps are in proportion to gradients: those of Adam magnify rounding without bound."""
    if "env" in case:
        parts = defaults(case["env"], case["learner"])
        parts[2].__dict__.update(case["algorithm"])
        for part in parts[:2]:
            part.__dict__.update({name: value for name, value in CONTROL.items() if hasattr(part, name)})
        trainer = run.build(*parts, ranks)[1]
    else:
        task = {**settings, **case.get("task", {})}
        trainer = make_trainer(task, case["algorithm"], case["learner"], ranks, **case["changes"])
    groups = [{"params": group["params"], "initial_lr": 0.1} for group in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups, lr=0.1)
    return trainer


def outcome(settings: Mapping[str, Any], case: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Metrics of two iterations, the weights after them, and the last rollout's actions."""
    trainer = trainer_of(settings, case, ranks)
    iterations = [iteration for iteration, _ in zip(trainer.iterate(), range(2), strict=False)]
    networks = trainer.algorithm.networks.trained
    return {
        "metrics": [iteration.metrics for iteration in iterations],
        "actions": iterations[-1].rollout.data["action"],
        "weights": {name: weights(network) for name, network in networks.items()},
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(index: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def main(job: dict[str, Any]) -> None:
    """Run every case."""
    torch.set_num_threads(1)
    with connected(60) as ranks:
        results = {name: outcome(job["settings"], case, ranks) for name, case in job["cases"].items()}
        torch.save(results, Path(job["output"]) / f"{ranks.index}.pt")


if __name__ == "__main__":
    main(torch.load(sys.argv[1], weights_only=False))
