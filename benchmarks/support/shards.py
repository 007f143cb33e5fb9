"""Memory of one rank: `torchrun ... -m benchmarks.support.shards JOB`, for benchmarks/ranks.py.

JOB: a JSON file with `output`, a folder, `env_arg`, and settings of training on text. Every rank runs one iteration and
writes `output/INDEX.json`: bytes of trained weights, gradients and optimizer state at the last step, and of the whole
process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agents import run
from agents.presets import defaults
from agents.ranks import connected
from agents.trainer import Trainer
from benchmarks.support.measure import PeakMemory, return_memory


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this process holds of them."""
    found = (each.to_local() if isinstance(each, DTensor) else each for each in tensors if isinstance(each, Tensor))
    return sum(each.numel() * each.element_size() for each in found)


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state."""
    weights = [weight for some in trainer.parameters.values() for weight in some]
    state = (value for each in trainer.optimizer.state.values() for value in each.values())
    return {
        "weights": local_bytes(weights),
        "gradients": local_bytes(weight.grad for weight in weights),
        "optimizer": local_bytes(state),
    }


def measure(job: dict[str, Any]) -> None:
    """One iteration."""
    torch.set_num_threads(1)
    train, text, algorithm = defaults("TextGen-v0", "ppo")
    train = replace(train, iterations=1, minibatch_size=job["minibatch_size"], env_arg=tuple(job["env_arg"]))
    text = replace(text, rollout_size=job["rollout_size"], shard=job["shard"], evaluation_prompts=4)
    with connected(600) as ranks:
        with PeakMemory() as building:
            _, trainer = run.build(train, text, replace(algorithm, epochs=1), ranks)
        found = {"peak while building": building.peak}
        return_memory()
        found["built"] = psutil.Process().memory_info().rss
        trainer.optimizer.register_step_pre_hook(lambda *_: found.update(held(trainer)))
        trainer.optimizer.register_step_post_hook(lambda *_: found.update(optimizer=held(trainer)["optimizer"]))
        list(trainer.iterate())
        return_memory()
        found["after an iteration"] = psutil.Process().memory_info().rss
        with PeakMemory() as rollout:
            trainer.collector.collect(trainer.algorithm.networks.policy)
        found["peak of a rollout"] = rollout.peak
        (Path(job["output"]) / f"{ranks.index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
