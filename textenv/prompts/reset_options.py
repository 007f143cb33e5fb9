"""The options of `reset(options={...})`: a prompt of the caller's own, or a prompt of the environment by its index.

| option | meaning | environments |
|---|---|---|
| `"prompt"` | one prompt, of any form that an entry of `prompts` may have, for all rows that are reset | all |
| `"prompt_index"` | an index into the environment's prompts, for all rows that are reset | all |
| `"prompts"` | a list of `num_envs` prompts, one per row | vector, TorchRL |
| `"prompt_indices"` | a list of `num_envs` indices, one per row | vector, TorchRL |
| `"reset_mask"` | bool array [num_envs]: the rows to reset, all by default | vector |

At most one of the first four may be used. `info["prompt_index"]` is -1 for a prompt of the caller's own. The order of
the sampler goes on as if nothing had been asked for. A prioritized sampler learns from prompts chosen by index, and not
from the caller's own. A prompt of the caller's own must have the fields that the reward needs:
`{"prompt": "2+2=", "answer": "4"}`.

Options apply to explicit resets only. Automatic resets of a vector environment play what the sampler draws. The
caller's options are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from textenv.prompts.tokenized import Prompts

FOR_ALL_ROWS = ("prompt", "prompt_index")
PER_ROW = ("prompts", "prompt_indices")  # vector environments only
Choice = tuple[Prompts, list[int]]  # prompts for the rows that are reset, and their indices (-1: the caller's own)


def choose_prompts(
    options: Mapping[str, Any] | None,
    task_prompts: Prompts,
    read: Callable[[Any], Prompts],
    rows: Sequence[int],
    num_envs: int,
) -> Choice | None:
    """The prompts that the options choose for `rows`, or None if the sampler draws them.

    read: tokenizes a list of texts, chats or rows. num_envs: 0 for a single environment, which takes no lists. Raises
    ValueError for an unknown option, for two at once, and for an invalid prompt or index.
    """
    chosen = {name: value for name, value in _as_mapping(options).items() if name != "reset_mask"}
    known = (*FOR_ALL_ROWS, *PER_ROW) if num_envs else FOR_ALL_ROWS
    for name in chosen:
        if name not in known:
            listed = ", ".join(("reset_mask", *known) if num_envs else known)
            raise ValueError(f"reset has no option {name!r}; known options are {listed}.")
    if len(chosen) > 1:
        raise ValueError(f"the options {sorted(chosen)} contradict each other; pass only one of them.")
    if not chosen:
        return None
    name, value = next(iter(chosen.items()))
    if name in PER_ROW:
        per_row = _check_per_row(name, value, num_envs)
        values = [per_row[row] for row in rows]
    else:
        values = [value] * len(rows)
    if name in ("prompt_index", "prompt_indices"):
        indices = [_check_index(index, len(task_prompts)) for index in values]
        return task_prompts.select(indices), indices
    return read(values), [-1] * len(rows)


def rows_to_reset(options: Mapping[str, Any] | None, num_envs: int) -> list[int]:
    """Indices of the rows that `options["reset_mask"]` marks; without a mask, all rows."""
    reset_mask = _as_mapping(options).get("reset_mask")
    if reset_mask is None:
        return list(range(num_envs))
    mask = np.asarray(reset_mask)
    if mask.dtype != np.bool_ or mask.shape != (num_envs,) or not mask.any():
        raise ValueError(
            f"options['reset_mask'] must be a boolean array of shape ({num_envs},) with at least one true value, got "
            f"{reset_mask!r}."
        )
    return np.flatnonzero(mask).tolist()


def _as_mapping(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(options, Mapping | None):
        raise ValueError(f"options must be a dict, got {type(options).__name__}.")
    return options or {}


def _check_per_row(name: str, value: Any, num_envs: int) -> list[Any]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != num_envs:
        raise ValueError(f"the option {name!r} must be a list of {num_envs} (num_envs), one per row, got {value!r}.")
    return list(value)


def _check_index(value: Any, size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < size:
        raise ValueError(f"a prompt index must be a whole number from 0 to {size - 1}, got {value!r}.")
    return int(value)
