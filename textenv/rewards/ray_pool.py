"""Rewards in processes of their own, on this machine or others: a pool of Ray actors behind a plain function.

For rewards that are slow, need a GPU, or must not share the trainer's process. Ray (https://docs.ray.io) starts the
actors on the cluster that RAY_ADDRESS names, or on this machine. Each is built once, and scores a part of every batch.
Under torchrun every process has actors of its own; start a cluster first (`ray start --head`, RAY_ADDRESS=auto), so
that all draw on the same GPUs.

    @textenv.ray_actors(count=4, num_gpus=1)
    class Judge:
        def __init__(self):
            self.model = load_model()

        def __call__(self, prompts, responses, answer):
            return self.model.rate(prompts, responses, answer)

A function may be decorated as well, but none that is async. `reward="module:Judge"` then works like any plain function:
its further parameters take the prompts' fields, `reward_timeout` limits a call, and errors name the reward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def ray_actors(count: int = 1, **resources: Any) -> Callable[[Callable[..., Any]], RayActors]:
    """Decorate a plain reward function, or a class whose objects are one, so that Ray's actors call it.

    count: actors, each of which scores a part of every batch; resources: of each, as in `ray.remote`, for instance
    num_gpus=0.5 or num_cpus=2.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"ray_actors takes a number of actors, 1 or more, got {count!r}; write @textenv.ray_actors(count=2) above "
            "the function or class."
        )
    return lambda target: RayActors(target, count, resources)


class RayActors:
    """A plain reward function `f(prompts, responses, **fields) -> list of floats`, called by a pool of actors."""

    def __init__(self, target: Callable[..., Any], count: int, resources: dict[str, Any]) -> None:
        method: Any = target.__call__ if isinstance(target, type) else target
        if inspect.iscoroutinefunction(method) or not (inspect.isroutine(method) or inspect.isclass(target)):
            raise ValueError(
                f"ray_actors takes a plain function f(prompts, responses, **fields), or a class of them, got "
                f"{target!r}; leave other decorators and `async` out."
            )
        self.target, self.count, self.resources = target, count, resources
        self.pool: Any = None  # started by the first call, and taken out of here by a call that runs
        signature = inspect.signature(method)
        parameters = list(signature.parameters.values())[1 if isinstance(target, type) else 0 :]  # without `self`
        self.__signature__ = signature.replace(parameters=parameters)
        self.__name__ = getattr(target, "__name__", type(target).__name__)

    def __call__(self, prompts: list[str], responses: list[str], **fields: list[Any]) -> list[float]:
        """Scores of B responses, in their order. Raises what the function raises, or RuntimeError for a lost actor."""
        ray = _ray()
        # A call that was abandoned keeps its pool: its actors are at work, and end with it.
        pool, self.pool = self.pool or self._start(ray), None
        bounds = [len(responses) * index // self.count for index in range(self.count + 1)]
        columns = (prompts, responses, *fields.values())
        parts = [[column[low:high] for column in columns] for low, high in pairwise(bounds)]
        names = tuple(fields)
        try:
            scored = list(pool.map(lambda actor, part: actor.score.remote(names, *part), filter(_rows, parts)))
        except ray.exceptions.RayTaskError as error:
            _end(ray, pool)
            raise error.cause from None  # what the function has raised
        except ray.exceptions.RayError as error:
            _end(ray, pool)
            raise RuntimeError(f"Ray lost an actor ({str(error).strip().splitlines()[0]})") from error
        self.pool = pool
        return [score for part in scored for score in part]

    def stop(self) -> None:
        """End the actors; the next call starts new ones."""
        pool, self.pool = self.pool, None
        if pool is not None:
            _end(_ray(), pool)

    def _start(self, ray: Any) -> Any:
        from ray.util import ActorPool

        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR)
        needed, there = self.count * self.resources.get("num_gpus", 0), ray.cluster_resources().get("GPU", 0)
        if needed > there:
            raise ValueError(f"{self.count} actors need {needed:g} GPUs, and Ray's cluster has {there:g}")
        options = {"num_cpus": 0} | self.resources
        actors = [ray.remote(_Actor).options(**options).remote(self.target) for _ in range(self.count)]
        pool: Any = ActorPool(actors)
        pool.actors = actors  # ActorPool forgets those at work
        return pool


def _end(ray: Any, pool: Any) -> None:
    for actor in pool.actors:
        ray.kill(actor)


class _Actor:
    """What runs in a process of its own."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target, self.function = target, None if isinstance(target, type) else target

    def score(self, names: tuple[str, ...], prompts: list[str], responses: list[str], *values: list[Any]) -> Any:
        """Scores of a part of the batch, as many as there are responses."""
        if self.function is None:
            self.function = self.target()  # here and not above: Ray shows only what methods raise
        scores = self.function(prompts, responses, **dict(zip(names, values, strict=True)))
        scores = scores.tolist() if hasattr(scores, "tolist") else list(scores)
        if len(scores) != len(responses):
            raise ValueError(f"the function returned {len(scores)} numbers for {len(responses)} responses")
        return scores


def _rows(part: list[list[Any]]) -> bool:
    return bool(part[0])


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"this reward runs on Ray, which is not here ({error}). Install it with: pip install 'textenv[ray]'"
        ) from error
    return ray
