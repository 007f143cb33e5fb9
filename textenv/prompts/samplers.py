"""In which order prompts are played: four strategies behind one protocol, and groups of episodes on one prompt.

Pure arithmetic on prompt indices: no tokens, no models, and no generator of their own, so that whoever draws decides
where the randomness comes from. What a strategy has seen is its state, and goes into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class PromptSampler(Protocol):
    """Decides which prompt is played next."""

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices; many small draws give what one large draw gives."""
        ...

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Learns what the episodes just finished on these prompts were worth."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped, fit for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave. Raises ValueError where it was of another number of prompts."""
        ...


class UniformSampler:
    """Each prompt as likely as any other, with replacement."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [int(generator.integers(self.size)) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Nothing: chance has no memory."""

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts, to be compared."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        _check_size(state, self.size)


class ShuffledSampler:
    """Rounds without replacement: each prompt once a round, in another order every round."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.queue: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # what is left of the round

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        while len(self.queue) < count:
            self.queue = np.concatenate([self.queue, generator.permutation(self.size)])
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn.tolist()

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Nothing: the round is what it is."""

    def state_dict(self) -> dict[str, Any]:
        """The rest of the round."""
        return {"size": self.size, "queue": self.queue.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        _check_size(state, self.size)
        self.queue = np.asarray(state["queue"], dtype=np.int64)


class WeightedSampler:
    """With replacement, each prompt in proportion to its weight; one of weight 0 is never drawn."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.size = len(weights)
        self.cumulative = _check_weights(weights).cumsum()
        self.cumulative /= self.cumulative[-1]  # ends in exactly 1, which no random() reaches

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [_pick(self.cumulative, generator) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Nothing: the weights are the user's."""

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts, to be compared."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        _check_size(state, self.size)


class PrioritizedSampler:
    """A curriculum: prompts whose recent returns are low come more often, and none is forgotten.

    The rank-based scheme of Prioritized Level Replay (Jiang et al. 2021), with the return where they have the value
    loss, since a prompt that is already answered well has little left to teach:

        P(i) = (1 − staleness) · rank(i)^−exponent / Σ_j rank(j)^−exponent  +  staleness · age(i) / Σ_j age(j)

    rank 1 is the lowest recent return; prompts never played rank before all others, so each is tried once before the
    order means much; prompts of equal return share the probability of their ranks equally. age(i) = 1 + the episodes
    finished since i was last updated. The recent return is the mean of the last `window` returns; an exponential
    average would make the most played of equally hopeless prompts the lowest, and play it still more. Ranks, unlike
    values, do not care for the scale of the reward. The exponent is that of rank-based replay in Schaul et al.
    (2016): a whole rollout is drawn before any of it is known, and a steeper one would fill it with the same prompt.
    """

    def __init__(self, size: int, *, exponent: float = 0.7, staleness: float = 0.1, window: int = 4) -> None:
        self.size, self.staleness = size, staleness
        self.by_rank = (np.arange(1, size + 1) ** -exponent).cumsum()
        self.by_rank /= self.by_rank[-1]
        self.returns = np.full((size, window), np.nan)  # the last ones, newest last; NaN = not played so often
        self.recent = np.full(size, -np.inf)  # their mean; -inf = never played
        self.updated = np.zeros(size, dtype=np.int64)  # `episodes` when the prompt was last updated
        self.episodes = 0  # finished so far

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        return [self._draw(generator) for _ in range(count)]

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Several episodes on one prompt in one call count as one, of their mean return."""
        total: dict[int, list[float]] = {}
        for index, value in zip(indices, returns, strict=True):
            total.setdefault(index, []).append(value)
        self.episodes += len(indices)
        for index, values in total.items():
            row = self.returns[index]
            row[:-1], row[-1] = row[1:].copy(), sum(values) / len(values)
            self.recent[index] = np.nanmean(row)
            self.updated[index] = self.episodes

    def state_dict(self) -> dict[str, Any]:
        """The last returns of each prompt and when they were updated."""
        returns = [row[~np.isnan(row)].tolist() for row in self.returns]
        return {"size": self.size, "returns": returns, "updated": self.updated.tolist(), "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
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
            return _pick(ages / ages[-1], generator)
        rank = _pick(self.by_rank, generator)  # first a rank, then who holds it: no sorting
        value = np.partition(self.recent, rank)[rank]
        tied = np.flatnonzero(self.recent == value)
        return int(tied[generator.integers(len(tied))])


class GroupedSampler:
    """Each prompt that another sampler draws, `group_size` times in a row: what group-relative learners compare."""

    def __init__(self, sampler: PromptSampler, group_size: int) -> None:
        self.sampler, self.group_size = sampler, group_size
        self.queue: list[int] = []  # what is left of the group

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """The next `count` prompt indices."""
        while len(self.queue) < count:
            self.queue += self.sampler.draw(generator, 1) * self.group_size
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn

    def update(self, indices: Sequence[int], returns: Sequence[float]) -> None:
        """Hands it on."""
        self.sampler.update(indices, returns)

    def state_dict(self) -> dict[str, Any]:
        """The rest of the group, and the other sampler's state."""
        return {"queue": list(self.queue), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.queue = list(state["queue"])
        self.sampler.load_state_dict(state["sampler"])


# A strategy from the number of prompts and their field `weight` (None where they have none).
SAMPLERS: dict[str, Callable[[int, Sequence[float] | None], PromptSampler]] = {
    "uniform": lambda size, weights: UniformSampler(size),
    "shuffle": lambda size, weights: ShuffledSampler(size),
    "weighted": lambda size, weights: WeightedSampler(_given(weights)),
    "prioritized": lambda size, weights: PrioritizedSampler(size),
}


def make_sampler(strategy: str, size: int, weights: Sequence[float] | None, group_size: int) -> PromptSampler:
    """The strategy of that name over `size` prompts, in groups. Raises ValueError for weights it cannot use."""
    sampler = SAMPLERS[strategy](size, weights)
    return sampler if group_size == 1 else GroupedSampler(sampler, group_size)


def _pick(cumulative: NDArray[np.float64], generator: np.random.Generator) -> int:
    """An index by its share; cumulative: [N], rising to exactly 1."""
    return int(np.searchsorted(cumulative, generator.random(), side="right"))


def _given(weights: Sequence[float] | None) -> Sequence[float]:
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
    """NaN for what is no number."""
    if type(weight) is float:  # the usual case first: every row of an environment looks at every weight
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
            f"the saved state is of {state['size']} prompts, and there are {size} now; go on with the prompts that it "
            "was saved with, or start anew."
        )
