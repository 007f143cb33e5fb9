"""Where the time of an iteration goes: a table of its phases, and a trace of its operations.

Three iterations: one to warm up, one timed with the device idle at the borders of phases, one that counts operations
and is traced. Rates are those of the timed one; the count is scaled by its number of tokens.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from agents.reporting.phases import observed
from agents.reporting.report import machine
from textenv.training.files import write_json

ITERATIONS = 3

# The vendors' figures: dense bfloat16 operations a second, and bytes of memory a second.
PEAKS = {
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "RTX 5090": (209e12, 1.79e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.94e12),
}


def peak_of(device: torch.device) -> tuple[float, float]:
    """Operations (bfloat16) and bytes of memory a second at best; zeros for a device that is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)), (0.0, 0.0))


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration, all its parts together."""

    name: str
    seconds: float
    operations: float  # floating-point operations of matrix products and attention


@dataclass(frozen=True)
class Profile:
    """An iteration, measured."""

    phases: list[Phase]
    seconds: float
    steps: int  # tokens or frames
    peak_bytes: int  # of the device's memory; on a CPU of the process
    read_bytes: float  # that decoding must at least read: the weights at every step, and each row's cache; 0 if unknown
    peak: tuple[float, float]  # of the device, see `peak_of`

    def table(self, unit: str) -> Table:
        """The phases, and the iteration as a whole."""
        table = Table("phase", "seconds", "share", f"{unit}/s", "GFLOP/s", "MFU", "bandwidth", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for part in (*self.phases, Phase("iteration", self.seconds, sum(each.operations for each in self.phases))):
            rate = part.operations / part.seconds
            read = self.read_bytes / part.seconds if part.name == "decode" else 0.0
            table.add_row(
                part.name,
                f"{part.seconds:.3f}",
                f"{part.seconds / self.seconds:.0%}",
                f"{self.steps / part.seconds:,.0f}",
                f"{rate / 1e9:,.1f}" if rate else "",
                f"{rate / self.peak[0]:.1%}" if rate and self.peak[0] else "",
                f"{read / self.peak[1]:.1%}" if read and self.peak[1] else "",
            )
        return table


class Clock:
    """Seconds and operations by phase, without those of phases inside it. With a counter, seconds mean little."""

    def __init__(self, device: torch.device, counter: FlopCounterMode | None = None) -> None:
        self.device, self.counter = device, counter
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self.mark: tuple[float, float] = (0.0, 0.0)
        self.running: list[tuple[str, Any]] = []  # phases that have begun, the innermost last

    def begin(self, name: str) -> None:
        """Wait for the device, and start the clock."""
        self._count()
        self.running.append((name, record_function(name)))
        self.running[-1][1].__enter__()

    def end(self, name: str) -> None:
        """Wait for the device, and add the time since `begin`."""
        self._count()
        self.running.pop()[1].__exit__(None, None, None)

    def _count(self) -> None:
        """Add what has passed since the last call to the innermost phase."""
        now = self._now()
        if self.running:
            name = self.running[-1][0]
            self.seconds[name] += now[0] - self.mark[0]
            self.operations[name] += now[1] - self.mark[1]
        self.mark = now

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), 0.0 if self.counter is None else float(self.counter.get_total_flops())


def profile_iterations(trainer: Any, trace: Path) -> Profile:
    """Run three iterations of a trainer that has at least three left, and write a trace for Perfetto."""
    device, iterations = trainer.device, trainer.iterate()
    next(iterations)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    started = clock._now()[0]
    with observed(clock):
        timed = next(iterations).rollout
    seconds, peak_bytes = clock._now()[0] - started, _peak_bytes(device)
    if hasattr(trainer.collector, "decoding"):  # operations in a compiled step or a graph would not be counted
        trainer.collector.decoding = replace(trainer.collector.decoding, compile=False)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with ExitStack() as stack:
        traced = stack.enter_context(profile(activities=activities))
        counted = Clock(device, stack.enter_context(FlopCounterMode(display=False)))
        stack.enter_context(observed(counted))
        rollout = next(iterations).rollout
    if trainer.ranks.first:
        traced.export_chrome_trace(str(trace))
    steps, counted_steps = (int(each.data["mask"].sum()) for each in (timed, rollout))
    phases = [
        Phase(name, clock.seconds[name], counted.operations[name] * steps / counted_steps) for name in clock.seconds
    ]
    phases.append(Phase("rest", max(seconds - sum(clock.seconds.values()), 1e-9), 0.0))
    read = decode_bytes(trainer, timed.data) if "decode" in clock.seconds else 0.0
    return Profile(phases, seconds, steps, peak_bytes, read, peak_of(device))


def decode_bytes(trainer: Any, data: Any) -> float:
    """Bytes that decoding must read: all weights at every step, and the keys and values of each text so far."""
    model = trainer.collector.sampling_model(trainer.algorithm.networks.policy)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = model.dtype.itemsize
    token = 2 * config.num_hidden_layers * heads * width * size
    lengths, texts = data["mask"].sum(1), data["attention_mask"].sum(1)  # [B]
    cached = (lengths * (texts - lengths) + lengths * (lengths - 1) / 2).sum()  # tokens in the cache, over all steps
    weights = trainer.algorithm.networks.policy.model.parameters()  # a sharded policy's copy has none at present
    return float(lengths.max()) * sum(each.numel() for each in weights) * size + float(cached) * token


def write_profile(measured: list[Profile], unit: str, device: torch.device, file: Path) -> None:
    """The numbers of the table, as JSON; of several ranks also the seconds of each. measured: of every rank."""
    ranks = {"ranks": [{part.name: part.seconds for part in each.phases} for each in measured]}
    numbers = asdict(measured[0]) | {"unit": unit} | machine(device) | (ranks if len(measured) > 1 else {})
    write_json(file, numbers)


def rank_lines(measured: list[Profile]) -> list[str]:
    """Where each rank's time went, a line a rank; nothing for one by itself.

    Sharded networks exchange weights and gradients inside of forwards and backward passes: the trace shows them.
    """
    kinds = {"rollout": ("play", "decode", "score"), "waiting for others": ("wait",), "exchanging": ("exchange",)}
    found = []
    for index, each in enumerate(measured):
        seconds = {
            kind: sum(part.seconds for part in each.phases if part.name in names) for kind, names in kinds.items()
        }
        seconds |= {"the rest": each.seconds - sum(seconds.values())}
        listed = ", ".join(f"{kind} {value:.3f}" for kind, value in seconds.items())
        found.append(f"rank {index}: {listed} of {each.seconds:.3f} seconds; peak {each.peak_bytes / 2**20:,.0f} MiB")
    return found if len(found) > 1 else []


def remarks(measured: Profile, files: Iterable[Path]) -> list[str]:
    """What a reader should know beside the table."""
    names = " and ".join(map(str, files))
    notes = [f"peak memory {measured.peak_bytes / 2**20:,.0f} MiB; {names} written: open the trace at ui.perfetto.dev"]
    if not measured.peak[0]:
        notes.append("no MFU and no share of the bandwidth: this device's peak is not in the table")
    return notes


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
