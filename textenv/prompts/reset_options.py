"""What `reset(options={...})` may ask for: a prompt of the caller's own, or one of the environment's by its index.

Options reach explicit resets only: the episodes that a vector environment starts by itself play what the sampler
draws. Nothing that is passed is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from textenv.prompts.tokenized import Prompts

SINGLE = ("prompt", "prompt_index")  # one for all rows that are reset
SEVERAL = ("prompts", "prompt_indices")  # one for each row of a vector environment
Choice = tuple[Prompts, list[int]]  # prompts for the rows that are reset, and their indices (-1: not the task's)


def choose_prompts(
    options: Mapping[str, Any] | None,
    own: Prompts,
    read: Callable[[Any], Prompts],
    rows: Sequence[int],
    num_envs: int,
) -> Choice | None:
    """The prompts that the options name for these rows, or None where the sampler is to draw.

    own: the environment's prompts; read: makes prompts of a list of texts, chats or rows.
    `num_envs` is 0 for a single environment, which has no use for lists. Raises ValueError for unknown options, for
    two at once, and for what is no prompt or index.
    """
    given = {name: value for name, value in _as_mapping(options).items() if name != "reset_mask"}
    known = (*SINGLE, *SEVERAL) if num_envs else SINGLE
    for name in given:
        if name not in known:
            listed = ", ".join(("reset_mask", *known) if num_envs else known)
            raise ValueError(f"reset takes no option {name!r}; known options are {listed}.")
    if len(given) > 1:
        raise ValueError(f"the options {sorted(given)} contradict each other; give one of them.")
    if not given:
        return None
    name, value = next(iter(given.items()))
    if name in SEVERAL:
        values = _one_a_row(name, value, num_envs)
        asked = [values[row] for row in rows]
    else:
        asked = [value] * len(rows)
    if name in ("prompt_index", "prompt_indices"):
        indices = [_check_index(one, len(own)) for one in asked]
        return own.select(indices), indices
    return read(asked), [-1] * len(rows)


def rows_to_reset(options: Mapping[str, Any] | None, num_envs: int) -> list[int]:
    """The rows that `options["reset_mask"]` marks, or all of them."""
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


def _one_a_row(name: str, value: Any, num_envs: int) -> list[Any]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != num_envs:
        raise ValueError(f"the option {name!r} must be a list of {num_envs} (num_envs), one a row, got {value!r}.")
    return list(value)


def _check_index(value: Any, size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < size:
        raise ValueError(f"a prompt's index must be a whole number from 0 to {size - 1}, got {value!r}.")
    return int(value)
