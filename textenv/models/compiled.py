"""The decoding step in few launches: compiled by torch.compile, or on CUDA captured as a graph, without a compiler.

What is compiled is `read_token`, once for each number of rows and of columns read; on a CPU one compilation serves all
shapes. Weights may change in place between rollouts, as an optimizer changes them. A graph also wants the cache at its
old address, so the cache stays with the graphs, and both are lent to one decoder at a time.

The first step of every shape is also taken by `read_token`. Where the two differ, or the architecture cannot be
compiled, every step is `read_token`: slower, said once, and right.
"""

from __future__ import annotations

import logging
import threading
import weakref
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textenv.models.cache import Buffers, KeyValueCache, Step, read_token
from textenv.models.comparison import bound, relative_difference

logger = logging.getLogger(__name__)


class CompiledStep:
    """`read_token` of one model for one cache, in a form that is faster on its device."""

    def __init__(self, cache: KeyValueCache, addresses: tuple[int, ...], device: torch.device) -> None:
        self.cache, self.addresses = cache, addresses  # addresses: of the weights
        self.steps: dict[tuple[int, int], Step] = {}  # by rows and columns read
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # memory that graphs share

    def __call__(self, model: PreTrainedModel, buffers: Buffers, tokens: Tensor, columns: Tensor, used: int) -> Tensor:
        """Logits [B, V]."""
        arguments = (model, buffers, tokens, columns, used)
        shape = (len(tokens), used)
        if shape not in self.steps:
            self.steps[shape] = self._checked(arguments)
        return self.steps[shape](*arguments)

    def _checked(self, arguments: Any) -> Step:
        """The fast step for a new shape; `read_token` where that gives other numbers or cannot be compiled."""
        model, buffers = arguments[:2]
        try:
            if self.pool is None:
                for each in (each for layer in buffers for each in layer or ()):
                    torch._dynamo.mark_static(each, [1, 2, 3])  # else rows equal to such a size would be held for it
                step = _compiled()
            else:
                step = _captured(arguments, self.pool)
            difference = relative_difference(step(*arguments), read_token(*arguments))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of any kind: the architecture, or the lack of a compiler
            say_not_compiled(type(model).__name__, type(error).__name__)
            return read_token
        if difference <= bound(model.dtype):
            return step
        say_not_compiled(type(model).__name__, f"compiled logits are off by {difference:.0%} of their spread")
        return read_token


@lru_cache
def _compiled() -> Step:
    return torch.compile(read_token, dynamic=True, fullgraph=True)


def _captured(arguments: Any, pool: Any) -> Step:
    """A CUDA graph of the step. It reads its inputs from where the first ones were, and writes to the same logits.

    It is captured with other tokens than the first step's, so the comparison after it sees whether they are read.
    """
    model, buffers, tokens, columns, used = arguments
    tokens, columns = torch.zeros_like(tokens), columns.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries take their memory at the first call, which no graph may hold
        read_token(model, buffers, tokens, columns, used)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = read_token(model, buffers, tokens, columns, used)

    def replay(model: PreTrainedModel, buffers: Buffers, new_tokens: Tensor, new_columns: Tensor, used: int) -> Tensor:
        tokens.copy_(new_tokens)
        columns.copy_(new_columns)
        graph.replay()
        return logits.to(torch.float32, copy=True)  # the next replay overwrites them

    return replay


MOST_FREE = 2  # steps that a model keeps, with their caches: those of rollouts and of evaluations

_free: WeakKeyDictionary[PreTrainedModel, list[CompiledStep]] = WeakKeyDictionary()
_lock = threading.Lock()


def borrow_step(model: PreTrainedModel, rows: int, columns: int, borrower: object) -> CompiledStep:
    """A step with a cache [B, L], old or new.

    When `borrower` is deleted, others get it with the graphs that it captured. On a CPU, where what is compiled belongs
    to no cache, the step goes with its borrower.
    """
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    if model.device.type != "cuda":
        return CompiledStep(KeyValueCache(model, rows, columns), addresses, model.device)
    with _lock:
        return _borrow(model, (rows, columns), addresses, borrower)


def _borrow(
    model: PreTrainedModel, size: tuple[int, int], addresses: tuple[int, ...], borrower: object
) -> CompiledStep:
    free = _free.setdefault(model, [])
    free[:] = [step for step in free if step.addresses == addresses]  # graphs of weights that were replaced
    fitting = [step for step in free if step.cache.size == size]
    step = fitting[0] if fitting else CompiledStep(KeyValueCache(model, *size), addresses, model.device)
    if fitting:
        free.remove(step)
        step.cache.clear()
    weakref.finalize(borrower, _give_back, free, step)
    return step


def _give_back(free: list[CompiledStep], step: CompiledStep) -> None:
    free.append(step)
    del free[:-MOST_FREE]


@lru_cache
def say_not_compiled(name: str, reason: str) -> None:
    """One line per architecture and process."""
    logger.warning(
        "the decoding step of %s is not compiled (%s): the numbers are right, and decoding is slower.", name, reason
    )
