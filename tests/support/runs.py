"""Small runs of `python -m agents` inside the test's process, what they leave on disk, and runs made up for a page."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from agents.__main__ import main, terminate
from agents.checkpoint import FILE
from agents.reporting import plots
from agents.reporting.viewer import RunReport

SIZES = dict(
    rollout_size=8, minibatch_size=4, micro_batch_tokens=80, epochs=1, evaluation_prompts=2, checkpoint_every=1
)

ELEMENT = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
NUMBERS = ("score", "penalty", "reward", "log_prob", "reference_log_prob", "entropy", "value", "td_error", "advantage")
PANEL = {
    "title": "Length",
    "unit": "tokens",
    "lines": [dict(metric="length", label="length", color="gray", evaluated="length")],
}


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


def stop_after(iterate, number: int, end: type[BaseException]):
    """An iteration of a trainer in whose place `end` is raised when `number` are done."""

    def stopped(trainer, watch):
        if trainer.iteration == number:
            raise end
        return iterate(trainer, watch)

    return stopped


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


def inside(page: bytes) -> dict[str, Any]:
    """The data that a page's script reads."""
    (data,) = ELEMENT.findall(page.decode("utf-8"))
    return json.loads(data)


def record(iteration: int, source: str, row: int, words: list[str], **changes: Any) -> dict[str, Any]:
    """A record with a prompt of one token, whose numbers count: the advantage of token t is t + row / 10 − 2."""
    ids, count = [crc32(word.encode("utf-8", "surrogatepass")) for word in ["prompt", *words]], len(words)
    numbers = {name: [round(at * 0.1 + row, 4) for at in range(count)] for name in NUMBERS}
    numbers["advantage"] = [round(at + row / 10 - 2, 4) for at in range(count)]
    fields = dict(prompt="prompt", tokens=["prompt", *words], ids=ids, generated=[0] + [1] * count)
    fields |= dict(special=[0] * (count + 1), numbers=numbers, finish="stop", raw_score=None)
    return dict(iteration=iteration, source=source, row=row, score=1.0, gold=1.0, kl=0.5) | fields | changes


def report(records: list[dict[str, Any]], **changes: Any) -> RunReport:
    """The report of a run of ten iterations."""
    metrics = [dict(iteration=at, score=at / 10, gold=1.0, kl_per_response=at / 5, length=20.0) for at in range(1, 11)]
    fields = dict(
        title="ppo on Made-Up", seed=3, folder="runs/made-up", iterations=10, panels=[PANEL], before={"length": 19.0}
    )
    fields |= dict(metrics=metrics, records=records, summary=dict(score_before=0.1, score_after=1.0), running=False)
    return RunReport(**(fields | changes))
