"""Python functions as rewards: of a batch, of one response at a time, of tokens and masks.

A function's exceptions, hangs and nonsense come out as one ValueError that names the reward, and the prompt and
response where they are known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textenv.rewards.base import ResponseBatch, Scores
from textenv.rewards.calling import CallFailed, CallOverdue, call_each, describe


@dataclass(frozen=True)
class PerResponse:
    """A function `f(prompt, response, **fields) -> float`, called for one response at a time."""

    function: Callable[..., Any]
    workers: int  # calls at the same time, each on a thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, as it was written."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class ReadsEpisodes:
    """A function `f(episodes: ResponseBatch) -> list of B floats, or a tensor`, which sees tokens and masks too."""

    function: Callable[[ResponseBatch], Any]

    def __call__(self, episodes: ResponseBatch) -> Any:
        """The function itself, as it was written."""
        return self.function(episodes)


def per_response(workers: int = 1) -> Callable[[Callable[..., Any]], PerResponse]:
    """A decorator for a reward function of one response: `f(prompt, response, **fields) -> float`.

    It may be slow, since `workers` calls run at the same time on threads; and it may be an `async def`.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(
            f"per_response takes a number of workers, 1 or more, got {workers!r}; write @per_response() or "
            "@per_response(workers=8) above the function."
        )
    return lambda function: PerResponse(function, workers)


def per_batch(function: Callable[[ResponseBatch], Any]) -> ReadsEpisodes:
    """A decorator for a reward function that reads tokens: `f(episodes: ResponseBatch) -> list of floats or tensor`."""
    return ReadsEpisodes(function)


class FunctionReward:
    """A Python function as a reward.

    By itself it is `f(prompts: list[str], responses: list[str]) -> list[float]`, called once for a batch, plain or
    `async`; `per_response` and `per_batch` mark the other forms. A parameter beyond the first two is a field of
    the prompts, by its name: a list of B values, or the one value of the response.
    """

    def __init__(self, function: Callable[..., Any], name: str, *, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        self.part_names = (name,)
        reads = isinstance(function, ReadsEpisodes)
        self.fields = PromptFields((), (), False) if reads else find_fields(function, name)

    def __call__(self, episodes: ResponseBatch) -> Scores:
        """Scores of B responses. Refuses what is not one number a response, finite or not."""
        scores = as_numbers(self._call(episodes), self.name, episodes).to(episodes.state.input_ids.device)
        return Scores(scores, {self.name: scores})

    def _call(self, episodes: ResponseBatch) -> Any:
        function = self.function
        fields = self.fields.of(episodes, self.name)
        if isinstance(function, PerResponse):
            return self._call_each(function, episodes, fields)
        if isinstance(function, ReadsEpisodes):
            return call_batch(lambda: function(episodes), episodes, self.name, self.timeout)
        prompts, responses = list(episodes.prompts), list(episodes.responses)
        return call_batch(lambda: function(prompts, responses, **fields), episodes, self.name, self.timeout)

    def _call_each(self, function: PerResponse, episodes: ResponseBatch, fields: dict[str, list[Any]]) -> list[Any]:
        prompts, responses = episodes.prompts, episodes.responses

        def call(index: int) -> Any:
            own = {name: values[index] for name, values in fields.items()}
            return function(prompts[index], responses[index], **own)

        try:
            return call_each(call, len(episodes), workers=function.workers, timeout=self.timeout)
        except CallFailed as failed:
            raise ValueError(
                f"reward {self.name!r} raised {describe(failed.error)} for {episodes.where(failed.index)}."
            ) from failed.error
        except CallOverdue as overdue:
            raise ValueError(
                f"reward {self.name!r} took longer than reward_timeout={self.timeout} seconds for "
                f"{episodes.where(overdue.index)}; make it faster, or raise reward_timeout."
            ) from overdue


@dataclass(frozen=True)
class PromptFields:
    """The prompts' fields that a function asks for by naming its parameters after them."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]  # parameters with a default of their own
    everything: bool  # it takes **fields

    def of(self, episodes: ResponseBatch, name: str) -> dict[str, list[Any]]:
        """The fields' values for these episodes. Raises ValueError that names a missing one."""
        self.check(episodes.fields, name)
        wanted = episodes.fields if self.everything else (*self.needed, *self.optional)
        return {field: list(episodes.fields[field]) for field in wanted if field in episodes.fields}

    def check(self, present: Collection[str], name: str) -> None:
        """Raises ValueError where the prompts lack a field that reward `name` needs; present: names."""
        missing = [field for field in self.needed if field not in present]
        if missing:
            raise ValueError(
                f"reward {name!r} needs the prompts' field {missing[0]!r}, and they have "
                f"{sorted(present) or 'no fields'}; give the field {missing[0]!r} beside every prompt, or the "
                "function's parameter a default."
            )


def find_fields(function: Callable[..., Any], name: str) -> PromptFields:
    """The parameters of a function beyond its first two."""
    written = function.function if isinstance(function, PerResponse) else function
    try:
        parameters = list(inspect.signature(written).parameters.values())
    except (TypeError, ValueError):  # built-ins do not tell theirs
        return PromptFields((), (), False)
    kinds = [parameter.kind for parameter in parameters]
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ValueError(
            f"reward {name!r} must take two arguments, prompts and responses, got the parameters "
            f"{[str(parameter) for parameter in parameters]}; write f(prompts, responses), and fields after them."
        )
    further = positional[2:] + [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    return PromptFields(
        needed=tuple(one.name for one in further if one.default is one.empty),
        optional=tuple(one.name for one in further if one.default is not one.empty),
        everything=inspect.Parameter.VAR_KEYWORD in kinds,
    )


def call_batch(function: Callable[[], Any], episodes: ResponseBatch, name: str, timeout: float | None) -> Any:
    """What a function returns for a whole batch, or a ValueError that says which batch went wrong and how."""
    try:
        return call_each(lambda _: function(), 1, timeout=timeout)[0]
    except CallFailed as failed:
        raise ValueError(
            f"reward {name!r} raised {describe(failed.error)} for a batch of {_batch(episodes)}. "
            "A batch does not tell which response it was; a function of one response (textenv.per_response) does."
        ) from failed.error
    except CallOverdue as overdue:
        raise ValueError(
            f"reward {name!r} took longer than reward_timeout={timeout} seconds for a batch of {_batch(episodes)}; "
            "make it faster, or raise reward_timeout."
        ) from overdue


def as_numbers(returned: Any, name: str, episodes: ResponseBatch) -> Tensor:
    """What a function returned as float32 [B], on the CPU."""
    expected = len(episodes)
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"reward {name!r} must return a list of {expected} numbers, got {type(returned).__name__}: "
            f"{str(returned)[:80]!r}{_first_nonsense(returned, episodes)}."
        ) from error
    if scores.shape != (expected,):
        raise ValueError(
            f"reward {name!r} must return one number a response, {expected} in all, got shape "
            f"{tuple(scores.shape)}; return a flat list as long as `responses`."
        )
    return scores


def _first_nonsense(returned: Any, episodes: ResponseBatch) -> str:
    """Where in a list of the right length the first thing is that is no number."""
    if isinstance(returned, list | tuple) and len(returned) == len(episodes):
        for index, one in enumerate(returned):
            if not isinstance(one, int | float | np.number | Tensor):
                return f"; the first that is no number is {one!r:.80}, for {episodes.where(index)}"
    return ""


def _batch(episodes: ResponseBatch) -> str:
    count = len(episodes)
    if count == 0:
        return "no responses"
    return f"{count} response{'s' if count > 1 else ''}, the first of them {episodes.where(0)}"
