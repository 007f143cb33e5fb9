"""A replay buffer: rows of past rollouts, the newest in the place of the oldest, drawn from with replacement.

It is a TensorDict and a cursor. TorchRL's buffer takes rows of one shape only, while sets of allowed tokens
(`textenv.masks.token_sets`) are as wide as the largest of a rollout; and its sample of a few numbers a row takes three
times as long.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

FILLING = -1  # in a row that is narrower than others: what fills up sets of tokens
GIB = 2**30


class Replay:
    """At most `size` rows on one device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.storage: dict[str, Tensor] = {}  # [size, ...] each, once the first rows have come
        self.cursor = 0  # where the next row goes
        self.filled = 0  # rows that are there

    def __len__(self) -> int:
        return self.filled

    def extend(self, rows: TensorDict) -> None:
        """Adds rows, forgetting the oldest where it is full. Raises ValueError where memory does not suffice."""
        newest: dict[str, Any] = {name: value[-self.size :] for name, value in rows.items()}
        self._make_room(newest)
        count = min(len(rows), self.size)
        places = (self.cursor + torch.arange(count, device=self.device)) % self.size
        for name, kept in self.storage.items():
            kept[places] = _widened(newest[name].to(self.device), kept.shape[2:])
        self.cursor = (self.cursor + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def sample(self, count: int, generator: torch.Generator) -> TensorDict:
        """Rows drawn uniformly; the generator is one of the CPU."""
        index = torch.randint(self.filled, (count,), generator=generator).to(self.device)
        rows: Any = {name: kept[index] for name, kept in self.storage.items()}
        return TensorDict(rows, batch_size=[count], device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """The rows that are there, and the cursor."""
        return {"cursor": self.cursor, "rows": {name: kept[: self.filled] for name, kept in self.storage.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.storage, self.cursor, self.filled = {}, 0, 0
        if state["rows"]:
            count = len(next(iter(state["rows"].values())))
            self.extend(TensorDict(state["rows"], batch_size=[count]))
        self.cursor = int(state["cursor"])

    def _make_room(self, rows: dict[str, Tensor]) -> None:
        """Storage for rows as wide as these, allocated or widened."""
        if not self.storage:
            check_memory(self.size, sum(value[0].nbytes for value in rows.values()), self.device)
        for name, value in rows.items():
            kept = self.storage.get(name)
            if kept is None:
                self.storage[name] = torch.zeros(self.size, *value.shape[1:], dtype=value.dtype, device=self.device)
            elif any(new > old for new, old in zip(value.shape[2:], kept.shape[2:], strict=True)):
                check_memory(self.size, value[0].nbytes, self.device)
                self.storage[name] = _widened(kept, value.shape[2:])


def check_memory(size: int, row: int, device: torch.device) -> None:
    """Refuses a buffer of `size` rows of `row` bytes that the memory of a device cannot hold."""
    available = available_bytes(device)
    if size * row > available:
        raise ValueError(
            f"a replay buffer of {size} rows of {row} bytes takes {size * row / GIB:.1f} GiB, and {device.type} has "
            f"{available / GIB:.1f} GiB available; lower buffer_size to at most {available // row} rows."
        )


def available_bytes(device: torch.device) -> int:
    """What can still be allocated on a device; where the system does not tell, all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")  # Linux; counts caches, which the system gives up, as available
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _widened(value: Tensor, shape: torch.Size) -> Tensor:
    """value: [B, R, ...], filled up where `shape`, the dimensions after R, is larger."""
    extra = [max(new - old, 0) for new, old in zip(shape, value.shape[2:], strict=True)]
    if not any(extra):
        return value
    return torch.nn.functional.pad(value, [part for one in reversed(extra) for part in (0, one)], value=FILLING)
