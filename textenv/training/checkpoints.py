"""What a training keeps in its folder to go on from: what it was started with, and the checkpoints of the Trainer.

A process may be killed at any file that it writes or removes, so nothing is taken for whole by its name alone. The
Trainer goes on without an optimizer, a schedule or random numbers that are not there, and says nothing.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
PARTS = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", STATE)
NAME = re.compile(r"checkpoint-([0-9]+)")


def read_started(file: Path) -> Mapping[str, Any]:
    """What a stopped training was started with. Raises ValueError for a damaged file."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"{str(file)!r} is damaged, so nothing tells what the training was started with; start it anew, in another "
            "output folder."
        )
    return stored


def last_checkpoint(work: Path) -> Path | None:
    """The last checkpoint of which every file is there. Raises ValueError if one of them cannot be read."""
    found = ((NAME.fullmatch(path.name), path) for path in work.glob("checkpoint-*"))
    steps = {int(match[1]): path for match, path in found if match and _is_whole(path)}
    if not steps:
        return None
    last = steps[max(steps)]
    damaged = next((file for part in PARTS for file in sorted(last.glob(part)) if not _can_be_read(file)), None)
    if damaged is not None:
        raise ValueError(
            f"the checkpoint file {str(damaged)!r} is damaged; remove the folder {str(last)!r}, and --resume goes on "
            "from the checkpoint before it, or from the start."
        )
    return last


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(any(checkpoint.glob(part)) for part in PARTS)


def _can_be_read(file: Path) -> bool:
    """Whether a file of a checkpoint has its end, or, of the state, what a training goes on from."""
    if file.name == STATE:
        return _is_state(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)  # torch.save writes an archive, with its directory at the end
    try:
        with safe_open(os.fspath(file), "pt"):
            return True
    except Exception:  # of a library in Rust, with an error class of its own
        return False


def _is_state(state: Any) -> bool:
    rows = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(rows, list) or type(state.get("global_step")) is not int:
        return False
    return all(isinstance(row, dict) and isinstance(row.get("seconds"), int | float) for row in rows)
