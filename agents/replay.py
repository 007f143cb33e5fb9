"""A replay buffer: rows of past rollouts in a ring, sampled with replacement.

It is one tensor per key and a cursor. TorchRL's buffer needs rows of one shape, but sets of allowed tokens
(`textenv.masks.token_sets`) are as wide as the largest set of a rollout. Its sampling also takes three times as long
for rows of a few numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

FILLING = -1  # pads token sets of rows that are narrower than others
GIB = 2**30


class Replay:
    """A ring buffer of at most `size` rows on one device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.storage: dict[str, Tensor] = {}  # [size, ...] each, allocated with the first rows
        self.cursor = 0  # position of the next row
        self.filled = 0  # rows stored

    def __len__(self) -> int:
        return self.filled

    def extend(self, rows: TensorDict) -> None:
        """Add rows, overwriting the oldest when full. Raises ValueError if memory does not suffice."""
        newest: dict[str, Any] = {name: value[-self.size :] for name, value in rows.items()}
        self._make_room(newest)
        count = min(len(rows), self.size)
        places = (self.cursor + torch.arange(count, device=self.device)) % self.size
        for name, stored in self.storage.items():
            stored[places] = _widened(newest[name].to(self.device), stored.shape[2:])
        self.cursor = (self.cursor + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def sample(self, count: int, generator: torch.Generator) -> TensorDict:
        """Sample `count` rows uniformly with replacement. generator: on the CPU."""
        index = torch.randint(self.filled, (count,), generator=generator).to(self.device)
        rows: Any = {name: stored[index] for name, stored in self.storage.items()}
        return TensorDict(rows, batch_size=[count], device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """The stored rows and the cursor."""
        rows = {name: stored[: self.filled].clone() for name, stored in self.storage.items()}  # without the room beyond
        return {"cursor": self.cursor, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.storage, self.cursor, self.filled = {}, 0, 0
        if state["rows"]:
            count = len(next(iter(state["rows"].values())))
            self.extend(TensorDict(state["rows"], batch_size=[count]))
        self.cursor = int(state["cursor"])

    def _make_room(self, rows: dict[str, Tensor]) -> None:
        """Allocate storage, or widen it for rows as wide as these."""
        if not self.storage:
            check_memory(self.size, sum(value[0].nbytes for value in rows.values()), self.device)
        for name, value in rows.items():
            stored = self.storage.get(name)
            if stored is None:
                self.storage[name] = torch.zeros(self.size, *value.shape[1:], dtype=value.dtype, device=self.device)
            elif any(new > old for new, old in zip(value.shape[2:], stored.shape[2:], strict=True)):
                check_memory(self.size, value[0].nbytes, self.device)
                self.storage[name] = _widened(stored, value.shape[2:])


def check_memory(size: int, row_bytes: int, device: torch.device) -> None:
    """Raise ValueError if `size` rows of `row_bytes` exceed the available memory of the device."""
    available = free_memory(device)
    if available is not None and size * row_bytes > available:
        raise ValueError(
            f"a replay buffer of {size} rows of {row_bytes} bytes takes {size * row_bytes / GIB:.1f} GiB, and "
            f"{device.type} has {available / GIB:.1f} GiB available; lower buffer_size to at most "
            f"{available // row_bytes} rows."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    table = Path("/proc/meminfo")  # Linux
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text(encoding="utf-8").splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))  # of a container
    if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        lines = dict(line.split() for line in used.with_name("memory.stat").read_text(encoding="utf-8").splitlines())
        # Files that were read are counted as used, and given back when memory is asked for.
        found.append(int(text) - int(used.read_text(encoding="utf-8")) + int(lines.get("inactive_file", 0)))
    return min(found, default=None)


def _widened(value: Tensor, shape: torch.Size) -> Tensor:
    """Pad value [B, R, ...] with `FILLING` up to `shape`, the dimensions after R, where that is larger."""
    extra = [max(new - old, 0) for new, old in zip(shape, value.shape[2:], strict=True)]
    if not any(extra):
        return value
    return torch.nn.functional.pad(value, [part for width in reversed(extra) for part in (0, width)], value=FILLING)
