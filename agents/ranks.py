"""The processes of a run: one by itself, or the ranks that `torchrun` starts, which learn together.

Every rank has all networks, and draws from the same random streams. A rank writes and reads its own rows, then all rows
are exchanged. So whatever is computed from a rollout is computed from all of it, by every rank alike: samplers,
controllers, normalizers, advantages, metrics and minibatches need no care. Of a minibatch a rank takes its own rows,
and gradients are summed before a step. A run under N ranks thus takes the steps of one process, up to rounding.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
BUCKET = 2**24  # numbers that are summed at once: 64 MiB of float32
LOST = "another rank is gone, or took longer than rank_timeout"


class RankError(RuntimeError):
    """Another rank has failed, and says so by itself, or is gone."""


class Ranks:
    """One process by itself, the first of one."""

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.index == 0

    def share(self, rows: int) -> slice:
        """This rank's part of as many rows. It may be empty."""
        return slice(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def deal(self, minibatch: TensorDict) -> TensorDict:
        """This rank's rows of a minibatch, with about as many steps on every rank. There may be none."""
        return minibatch

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in their order. Where it fails on one, all fail."""
        return [work()]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here. Where it fails on one rank, all fail."""
        results: list[T] = []
        self.each(lambda: results.append(work()))
        return results[0]

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it."""
        return self.each(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks."""


ALONE = Ranks()


class ProcessGroup(Ranks):
    """The ranks of PyTorch's default process group."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def deal(self, minibatch: TensorDict) -> TensorDict:
        """See `Ranks.deal`. Rows are dealt like cards, longest first."""
        order = minibatch["mask"].sum(1).argsort(descending=True, stable=True)
        return minibatch[order[self.index :: self.count]]

    def each(self, work: Callable[[], T]) -> list[T]:
        """See `Ranks.each`. Results are pickled; their tensors arrive on the CPU."""
        result, error = None, None
        try:
            result = work()
        except RankError:
            raise
        except Exception as failure:
            error = failure
        buffer = io.BytesIO()
        torch.save((None if error is None else f"{type(error).__name__}: {error}", result), buffer)
        sent: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(sent, buffer.getvalue())
        except RuntimeError as lost:
            raise error or RankError(f"{LOST}: {lost}") from lost
        if error is not None:
            raise error
        received = [torch.load(io.BytesIO(each), map_location="cpu", weights_only=False) for each in sent]
        failed = [f"rank {index}: {message}" for index, (message, _) in enumerate(received) if message is not None]
        if failed:
            raise RankError("; ".join(failed))
        return [value for _, value in received]

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Ranks.sum_gradients`. A gradient that no rank has stays away, since Adam skips it then."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        there = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
        self._reduce(there)
        gradients: list[Tensor] = []
        for parameter, ranks in zip(trained, there.tolist(), strict=True):
            if ranks:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        while gradients:
            some = [gradients.pop()]
            while gradients and sum(each.numel() for each in some) < BUCKET:
                some.append(gradients.pop())
            bucket = torch.cat([gradient.flatten() for gradient in some])
            self._reduce(bucket)
            for gradient, total in zip(some, bucket.split([each.numel() for each in some]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def _reduce(self, values: Tensor) -> None:
        try:
            dist.all_reduce(values)
        except RuntimeError as lost:
            raise RankError(f"{LOST}: {lost}") from lost


def restarted() -> bool:
    """Whether torchrun, under `--max-restarts`, has started the processes again after one has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def connected(timeout: float) -> Iterator[Ranks]:
    """The ranks of this run, by what torchrun says in the environment. On CUDA each rank has the device of its number.

    timeout: seconds that a rank waits for the others before it gives up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun on one node keeps its store when it starts again, and with it the addresses of those that are gone.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()
