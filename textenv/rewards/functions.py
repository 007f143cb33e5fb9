"""Python functions as rewards.

Name a function as `reward="module:function"`, or pass it to `gym.make` directly. It has one of four forms:

- Plain: `f(prompts: list[str], responses: list[str]) -> list[float]`, called once for a batch.
- `@textenv.per_response(workers=8)`: `f(prompt, response) -> float`, called for one response at a time on a pool of
  threads. For slow functions, such as calls to a server.
- `@textenv.per_batch`: `f(batch: ResponseBatch) -> list of floats or tensor`. For functions that need token ids, masks
  or whether a response stopped.
- `@textenv.per_token`: `f(prompts: list[str], tokens: list[list[str]]) -> list[list[float]]`, one reward per token
  (per_token.py).

`@textenv.ray_actors(count=4)` runs a plain function, or a class of them, in processes of its own (ray_pool.py).

All forms may be `async`. All but `per_batch` (which has `batch.fields`) may take further parameters, which receive the
prompts' fields of the same name, such as `answer`: B values, or one value in the per-response form.

    @textenv.per_response(workers=8)
    async def helpful(prompt, response, answer):
        return 1.0 if answer in response else 0.0

`reward_timeout` limits every call, in seconds. An exception, a call over the limit or a wrong return value raises a
ValueError that names the reward, and the prompt and response where they are known.
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
    workers: int  # concurrent calls, each on its own thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the undecorated function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class PerBatch:
    """A function `f(batch: ResponseBatch) -> list of B floats or tensor [B]`, which sees tokens and masks."""

    function: Callable[[ResponseBatch], Any]

    def __call__(self, batch: ResponseBatch) -> Any:
        """Call the undecorated function."""
        return self.function(batch)


def per_response(workers: int = 1) -> Callable[[Callable[..., Any]], PerResponse]:
    """Decorate a reward function of one response: `f(prompt, response, **fields) -> float`, plain or `async`.

    Up to `workers` calls run concurrently on threads, so the function may be slow.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(
            f"per_response takes a number of workers, 1 or more, got {workers!r}; write @per_response() or "
            "@per_response(workers=8) above the function."
        )
    return lambda function: PerResponse(function, workers)


def per_batch(function: Callable[[ResponseBatch], Any]) -> PerBatch:
    """Decorate a reward function of the whole batch: `f(batch: ResponseBatch) -> list of B floats or tensor [B]`.

    The batch holds token ids and masks, decoded texts, the prompts' fields, and whether each response stopped.
    """
    return PerBatch(function)


class FunctionReward:
    """A plain, per-response or per-batch function as a reward."""

    def __init__(self, function: Callable[..., Any], name: str, *, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        self.part_names = (name,)
        takes_batch = isinstance(function, PerBatch)
        self.fields = PromptFields((), (), False) if takes_batch else find_fields(function, name)

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B responses. Raises ValueError unless the function returns one number per response."""
        scores = as_numbers(self._call(batch), self.name, batch).to(batch.state.input_ids.device)
        return Scores(scores, {self.name: scores})

    def _call(self, batch: ResponseBatch) -> Any:
        function = self.function
        fields = self.fields.of(batch, self.name)
        if isinstance(function, PerResponse):
            return self._call_each(function, batch, fields)
        if isinstance(function, PerBatch):
            return call_batch(lambda: function(batch), batch, self.name, self.timeout)
        prompts, responses = list(batch.prompts), list(batch.responses)
        return call_batch(lambda: function(prompts, responses, **fields), batch, self.name, self.timeout)

    def _call_each(self, function: PerResponse, batch: ResponseBatch, fields: dict[str, list[Any]]) -> list[Any]:
        prompts, responses = batch.prompts, batch.responses

        def call(index: int) -> Any:
            own_fields = {name: values[index] for name, values in fields.items()}
            return function(prompts[index], responses[index], **own_fields)

        try:
            return call_each(call, len(batch), workers=function.workers, timeout=self.timeout)
        except CallFailed as failed:
            raise ValueError(
                f"reward {self.name!r} raised {describe(failed.error)} for {batch.describe_row(failed.index)}."
            ) from failed.error
        except CallOverdue as overdue:
            raise ValueError(
                f"reward {self.name!r} took longer than reward_timeout={self.timeout} seconds for "
                f"{batch.describe_row(overdue.index)}; make it faster, or raise reward_timeout."
            ) from overdue


@dataclass(frozen=True)
class PromptFields:
    """The prompt fields that a function requests by parameter name."""

    required: tuple[str, ...]
    optional: tuple[str, ...]  # parameters with a default
    all_fields: bool  # the function takes **fields
    arguments: tuple[str, ...] = ()  # names of the parameters that take prompts and responses

    def of(self, batch: ResponseBatch, name: str) -> dict[str, list[Any]]:
        """The values of the requested fields, B each. Raises ValueError that names a missing field."""
        self.check(batch.fields, name)
        requested = batch.fields if self.all_fields else (*self.required, *self.optional)
        return {field: list(batch.fields[field]) for field in requested if field in batch.fields}

    def check(self, present: Collection[str], name: str, place: str = "") -> None:
        """Raise ValueError if the prompts' fields `present` lack one that reward `name` requires, or hide an argument.

        place: file and line of a prompt, for the message.
        """
        missing = [field for field in self.required if field not in present]
        if missing:
            raise ValueError(
                f"reward {name!r} needs the prompts' field {missing[0]!r}, and they have "
                f"{sorted(present) or 'no fields'}{place}; add the field {missing[0]!r} to every prompt, or give the "
                "function's parameter a default."
            )
        hidden = [field for field in self.arguments if field in present]
        if self.all_fields and hidden:
            raise ValueError(
                f"reward {name!r} takes all fields of the prompts, and their field {hidden[0]!r}{place} has the name "
                "of its argument; rename the field, or the argument."
            )


def find_fields(function: Callable[..., Any], name: str) -> PromptFields:
    """The prompt fields that a function requests: its parameters after the first two."""
    undecorated = function.function if isinstance(function, PerResponse) else function
    try:
        parameters = list(inspect.signature(undecorated).parameters.values())
    except (TypeError, ValueError):  # some built-ins have no signature
        return PromptFields((), (), False)
    _refuse_completions(function, name, [parameter.name for parameter in parameters])
    kinds = [parameter.kind for parameter in parameters]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ValueError(
            f"reward {name!r} must take two arguments, prompts and responses, got the parameters "
            f"{[str(parameter) for parameter in parameters]}; write f(prompts, responses), and prompt fields after "
            "them."
        )
    fields = positional[2:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return PromptFields(
        required=tuple(p.name for p in fields if p.default is p.empty),
        optional=tuple(p.name for p in fields if p.default is not p.empty),
        all_fields=inspect.Parameter.VAR_KEYWORD in kinds,
        arguments=tuple(p.name for p in positional[:2] if p.kind is p.POSITIONAL_OR_KEYWORD),
    )


def _refuse_completions(function: Callable[..., Any], name: str, parameters: list[str]) -> None:
    """Raise ValueError for a function with TRL's signature, whose arguments are passed by name."""
    if "completions" not in parameters:
        return
    rest = [one for one in parameters if one not in ("prompts", "completions", "completion_ids", "trainer_state")]
    variables = [f"**{one}" if one == parameters[-1] and one == "kwargs" else one for one in rest]
    raise ValueError(
        f"reward {name!r} has TRL's signature, ({', '.join(parameters)}); here a reward is called with texts, by "
        f"position. Rename completions to responses and begin with prompts: def "
        f"{getattr(function, '__name__', 'reward')}({', '.join(['prompts', 'responses', *variables])}), where each of "
        "responses is a text, also of a chat."
    )


def call_batch(function: Callable[[], Any], batch: ResponseBatch, name: str, timeout: float | None) -> Any:
    """Call a function once for a whole batch. Raises ValueError that names the reward and the batch."""
    try:
        return call_each(lambda _: function(), 1, timeout=timeout)[0]
    except CallFailed as failed:
        raise ValueError(
            f"reward {name!r} raised {describe(failed.error)} for a batch of {_describe_batch(batch)}. "
            "Decorate a function of one response with textenv.per_response to see which response failed."
        ) from failed.error
    except CallOverdue as overdue:
        raise ValueError(
            f"reward {name!r} took longer than reward_timeout={timeout} seconds for a batch of "
            f"{_describe_batch(batch)}; "
            "make it faster, or raise reward_timeout."
        ) from overdue


def as_numbers(returned: Any, name: str, batch: ResponseBatch) -> Tensor:
    """Convert the return value of a function to float32 [B], on the CPU."""
    expected = len(batch)
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"reward {name!r} must return a list of {expected} numbers, got {type(returned).__name__}: "
            f"{str(returned)[:80]!r}{_first_non_number(returned, batch)}."
        ) from error
    if scores.shape != (expected,):
        raise ValueError(
            f"reward {name!r} must return one number per response, {expected} in all, got shape "
            f"{tuple(scores.shape)}; return a flat list as long as `responses`."
        )
    return scores


def _first_non_number(returned: Any, batch: ResponseBatch) -> str:
    """Describe the first element that is not a number, in a list of the right length; empty if there is none."""
    if isinstance(returned, list | tuple) and len(returned) == len(batch):
        for index, value in enumerate(returned):
            if not isinstance(value, int | float | np.number | Tensor):
                return f"; the first that is not a number is {value!r:.80}, for {batch.describe_row(index)}"
    return ""


def _describe_batch(batch: ResponseBatch) -> str:
    count = len(batch)
    if count == 0:
        return "no responses"
    return f"{count} response{'s' if count > 1 else ''}, the first of them {batch.describe_row(0)}"
