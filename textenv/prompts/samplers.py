"""The order in which prompts are played: `prompt_sampling`, and groups of episodes on one prompt (`group_size`).

| `prompt_sampling` | order |
|---|---|
| `None` | "uniform" in the environment, "shuffle" for the learners |
| `"uniform"` | every prompt equally likely, with replacement |
| `"shuffle"` | each prompt once per round, in a new order every round |
| `"weighted"` | with replacement, in proportion to the prompts' field `weight`; weight 0 is never drawn |
| `"prioritized"` | a curriculum: prompts with low recent scores more often (Prioritized Level Replay) |

`group_size=G` plays each drawn prompt G times in a row, as group-relative learners (RLOO, GRPO) need.

In a vector environment every row has a sampler and a generator of its own. `reset(seed=...)` starts rounds, groups and
curricula from the beginning.

Samplers do arithmetic on prompt indices. They have no tokens, no models and no generator: the caller passes the
generator. Their memory is their state, and is part of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class PromptSampler(Protocol):
    """Draws the index of the next prompt."""

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices; several small draws equal one large draw."""
        ...

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Record the scores of episodes that ended on the prompts `indices`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The sampler's memory, as JSON values, so that a resumed run draws the same prompts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`. Raises ValueError for another number of prompts."""
        ...


class UniformSampler:
    """Every prompt equally likely, with replacement."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [int(generator.integers(self.size)) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Do nothing: draws do not depend on scores."""

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts, which `load_state_dict` checks."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        _check_size(state, self.size)


class ShuffledSampler:
    """Rounds without replacement: each prompt once per round, in a new order every round."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.queue: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # the rest of the round

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        while len(self.queue) < count:
            self.queue = np.concatenate([self.queue, generator.permutation(self.size)])
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn.tolist()

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Do nothing: draws do not depend on scores."""

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts and the rest of the round."""
        return {"size": self.size, "queue": self.queue.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        _check_size(state, self.size)
        self.queue = np.asarray(state["queue"], dtype=np.int64)


class WeightedSampler:
    """With replacement, in proportion to the weights; a prompt of weight 0 is never drawn."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.size = len(weights)
        self.cumulative = _check_weights(weights).cumsum()
        self.cumulative /= self.cumulative[-1]  # ends in exactly 1, and random() < 1

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [_sample_index(self.cumulative, generator) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Do nothing: the user fixes the weights."""

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts, which `load_state_dict` checks."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        _check_size(state, self.size)


class PrioritizedSampler:
    """A curriculum: prompts with low recent returns are drawn more often, and every prompt keeps being drawn.

    The rank-based scheme of Prioritized Level Replay (Jiang et al. 2021). The return replaces the paper's value loss,
    since a prompt that is already answered well has little left to teach:

        P(i) = (1 − staleness) · rank(i)^−exponent / Σ_j rank(j)^−exponent  +  staleness · age(i) / Σ_j age(j)

    Rank 1 is the lowest recent return. Prompts that were never played rank first, so that each is tried once before the
    order means much. Prompts with equal returns share the probability of their ranks equally. age(i) = 1 + the number
    of episodes finished since i was last updated.

    The recent return is the mean of the last `window` returns. An exponential average would make the most played of
    equally hard prompts the lowest, and play it still more. Ranks, unlike values, do not depend on the scale of the
    reward. The exponent is that of rank-based replay in Schaul et al. (2016): a whole rollout is drawn before any of
    its returns is known, and a steeper exponent would fill the rollout with one prompt.
    """

    def __init__(self, size: int, *, exponent: float = 0.7, staleness: float = 0.1, window: int = 4) -> None:
        self.size, self.staleness = size, staleness
        self.by_rank = (np.arange(1, size + 1) ** -exponent).cumsum()
        self.by_rank /= self.by_rank[-1]
        self.returns = np.full((size, window), np.nan)  # [N, window], newest last; NaN = fewer returns so far
        self.recent = np.full(size, -np.inf)  # [N], mean of `returns`; -inf = never played
        self.updated = np.zeros(size, dtype=np.int64)  # [N], value of `episodes` at the last update
        self.episodes = 0  # finished so far

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [self._draw(generator) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Record returns. Several episodes on one prompt in one call count as one episode with their mean return."""
        by_prompt: dict[int, list[float]] = {}
        for index, value in zip(indices, returns, strict=True):
            by_prompt.setdefault(index, []).append(value)
        self.episodes += len(indices)
        for index, values in by_prompt.items():
            row = self.returns[index]
            row[:-1], row[-1] = row[1:].copy(), sum(values) / len(values)
            self.recent[index] = np.nanmean(row)
            self.updated[index] = self.episodes

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts, their last returns, and when each was updated."""
        returns = [row[~np.isnan(row)].tolist() for row in self.returns]
        return {"size": self.size, "returns": returns, "updated": self.updated.tolist(), "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        _check_size(state, self.size)
        self.returns[:], self.recent[:] = np.nan, -np.inf
        for index, values in enumerate(state["returns"]):
            if values:
                self.returns[index, -len(values) :] = values
                self.recent[index] = np.nanmean(self.returns[index])
        self.updated = np.asarray(state["updated"], dtype=np.int64)
        self.episodes = int(state["episodes"])

    def _draw(self, generator: np.random.Generator) -> int:
        if generator.random() < self.staleness:
            ages = (1.0 + self.episodes - self.updated).cumsum()
            return _sample_index(ages / ages[-1], generator)
        rank = _sample_index(self.by_rank, generator)  # a partition finds the prompts of a rank without sorting
        value = np.partition(self.recent, rank)[rank]
        tied = np.flatnonzero(self.recent == value)
        return int(tied[generator.integers(len(tied))])


class GroupedSampler:
    """Repeats each prompt of another sampler `group_size` times in a row, for group-relative learners."""

    def __init__(self, sampler: PromptSampler, group_size: int) -> None:
        self.sampler, self.group_size = sampler, group_size
        self.queue: list[int] = []  # the rest of the group

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        while len(self.queue) < count:
            self.queue += self.sampler.draw(generator, 1) * self.group_size
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Pass the returns to the inner sampler."""
        self.sampler.update(indices, returns)

    def state_dict(self) -> dict[str, Any]:
        """The rest of the group and the inner sampler's state."""
        return {"queue": list(self.queue), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.queue = list(state["queue"])
        self.sampler.load_state_dict(state["sampler"])


# name -> constructor from the number of prompts and their field `weight` (None if they have none)
SAMPLERS: dict[str, Callable[[int, Sequence[float] | None], PromptSampler]] = {
    "uniform": lambda size, weights: UniformSampler(size),
    "shuffle": lambda size, weights: ShuffledSampler(size),
    "weighted": lambda size, weights: WeightedSampler(_require(weights)),
    "prioritized": lambda size, weights: PrioritizedSampler(size),
}


def make_sampler(strategy: str, size: int, weights: Sequence[float] | None, group_size: int) -> PromptSampler:
    """A sampler of `size` prompts by the name of its strategy, in groups. Raises ValueError for unusable weights."""
    sampler = SAMPLERS[strategy](size, weights)
    return sampler if group_size == 1 else GroupedSampler(sampler, group_size)


def _sample_index(cumulative: NDArray[np.float64], generator: np.random.Generator) -> int:
    """Sample an index by cumulative probabilities [N], which end in exactly 1."""
    return int(np.searchsorted(cumulative, generator.random(), side="right"))


def _require(weights: Sequence[float] | None) -> Sequence[float]:
    if weights is None:
        raise ValueError(
            "prompt_sampling='weighted' draws by the prompts' weights, and they have none; give rows such as "
            '{"prompt": "...", "weight": 2.0}, or choose another strategy.'
        )
    return weights


def _check_weights(weights: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.array([_as_float(weight) for weight in weights])
    bad = ~((numbers >= 0) & (numbers < np.inf))
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(
            f"the weight of prompt number {index} must be a finite number, 0 or more, got {weights[index]!r:.80}; 0 "
            "never draws it."
        )
    if not 0 < numbers.sum() < np.inf:
        raise ValueError(f"the weights of the prompts must sum to more than 0 and stay finite, got {numbers.sum()}.")
    return numbers


def _as_float(weight: Any) -> float:
    """The weight as a float; NaN if it is not a number."""
    if type(weight) is float:  # fast path: every row of an environment checks every weight
        return weight
    if isinstance(weight, bool) or not isinstance(weight, Real):
        return math.nan
    try:
        return float(weight)
    except OverflowError:
        return math.inf


def _check_size(state: dict[str, Any], size: int) -> None:
    if state["size"] != size:
        raise ValueError(
            f"the saved state has {state['size']} prompts, and there are {size} now; resume with the same prompts, or "
            "start a new run."
        )
