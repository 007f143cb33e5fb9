"""Small runs of `python -m agents` inside the test's process, and what they leave on disk."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from agents.__main__ import main, terminate
from agents.checkpoint import FILE
from agents.reporting import plots

SIZES = dict(
    rollout_size=8, minibatch_size=4, micro_batch_tokens=80, epochs=1, evaluation_prompts=2, checkpoint_every=1
)


def flags(settings: dict, **changes) -> list[str]:
    """The command line of a short run of PPO on a task with these arguments of `gym.make`."""
    pairs = [("--env-arg", f"{name}={json.dumps(value)}") for name, value in settings.items()]
    pairs += [
        (f"--{name.replace('_', '-')}", str(value)) for name, value in (SIZES | dict(iterations=2) | changes).items()
    ]
    return [word for pair in pairs for word in pair]


def train(folder: Path, settings: dict, **changes) -> None:
    """A new run."""
    main(["train", "--run", str(folder), *flags(settings, **changes)])


def resume(folder: Path, *more: str) -> None:
    """Go on with a run."""
    main(["train", "--run", str(folder), "--resume", *more])


def tensors(state: object) -> list[Tensor]:
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def saved(folder: Path) -> list[Tensor]:
    """All tensors of a run's checkpoint: weights, optimizer, generators."""
    return tensors(torch.load(folder / FILE, weights_only=True))


def rows(folder: Path) -> list[dict]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def start(log: Path, arguments: list[str]) -> None:
    """`python -m agents` in a process of its own, without pictures; its output goes to `log`."""
    plots.draw_curves = plots.draw_credit = lambda *_: None
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGTERM, terminate)
    main(arguments)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
