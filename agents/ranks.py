"""The processes of a run: one by itself, or the ranks that `torchrun` starts, which learn together.

Every rank has all networks, whole or a part of their weights, and draws from the same random streams. A rank writes and
reads its own rows, then all rows are exchanged. So whatever is computed from a rollout is computed from all of it, by
every rank alike: samplers, controllers, normalizers, advantages, metrics and minibatches need no care. Of a minibatch a
rank takes its own rows, and gradients are summed before a step. So a run under N ranks takes the steps of one process,
up to rounding.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from agents.reporting.errors import stop_behind
from agents.reporting.phases import is_observed, phase

T = TypeVar("T")
BUCKET = 2**24  # numbers that are summed at once: 64 MiB of float32
PARENT = os.getppid()  # torchrun, which may be gone when this process has started
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
        """This rank's rows of a minibatch: about as many tokens on every rank, or steps. There may be none."""
        return minibatch

    def each(self, work: Callable[[], T], in_step: bool = False) -> list[T]:
        """What `work` returns on every rank, in their order. Where it fails on one, all fail.

        in_step: ranks meet inside `work` too, so that one that fails there has to leave at once.
        """
        return [work()]

    def together(self, work: Callable[[], T], in_step: bool = False) -> T:
        """What `work` returns here. Where it fails on one rank, all fail. in_step: see `each`."""
        results: list[T] = []
        self.each(lambda: results.append(work()), in_step)
        return results[0]

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it."""
        return self.each(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks. Those of sharded weights are sums already."""

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number

    def check_device(self, name: str) -> None:
        """Raise ValueError for a device that several ranks of this machine would share, by its number."""

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks' devices in a line, for sharded weights. Raises ValueError without torchrun."""
        raise ValueError(
            "--shard full divides weights among the processes of torchrun, and there are none; start with "
            "`torchrun --nproc-per-node 2 -m -- agents train ...`, or leave it out."
        )


ALONE = Ranks()


class ProcessGroup(Ranks):
    """The ranks of PyTorch's default process group."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.line: DeviceMesh | None = None

    def deal(self, minibatch: TensorDict) -> TensorDict:
        """See `Ranks.deal`. Rows of like length go to one rank, where they need little padding."""
        length = (minibatch["attention_mask"] if "attention_mask" in minibatch else minibatch["mask"]).sum(1)
        length = length.clamp_min(1)  # [B]
        order = length.argsort(stable=True)
        middle = length[order].cumsum(0) - length[order] / 2
        rank = (middle * self.count / length.sum()).long()  # of each row in order: whose share its middle lies in
        return minibatch[order[rank == self.index]]

    def each(self, work: Callable[[], T], in_step: bool = False) -> list[T]:
        """See `Ranks.each`. Results are pickled; their tensors arrive on the CPU."""
        if os.getppid() != PARENT:  # processes outlive a torchrun that is killed
            raise RankError("torchrun, which had started this process, is gone")
        result, error = None, None
        try:
            result = work()
        except RankError:
            raise
        except Exception as failure:
            if in_step or stop_behind(failure) is not None:
                raise
            error = failure
        buffer = io.BytesIO()
        torch.save((None if error is None else f"{type(error).__name__}: {error}", result), buffer)
        sent: list[Any] = [None] * self.count
        try:
            self._wait()
            with phase("exchange"):
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
        trained = [each for each in parameters if each.requires_grad and not isinstance(each, DTensor)]
        if not trained:
            return
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

    def most(self, number: int) -> int:
        """See `Ranks.most`."""
        numbers = torch.tensor(number)
        self._reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def check_device(self, name: str) -> None:
        """See `Ranks.check_device`."""
        if ":" in name and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"device={name} is one device, and several processes of torchrun run on this machine; give "
                f"device={name.partition(':')[0]}, of which each takes its own."
            )

    def mesh(self, device: torch.device) -> DeviceMesh:
        """See `Ranks.mesh`."""
        if self.line is None:
            self.line = init_device_mesh(device.type, (self.count,))
        return self.line

    def _wait(self) -> None:
        """Wait for the other ranks, where somebody measures: otherwise whatever comes next does so."""
        with phase("wait"):
            if is_observed():
                dist.barrier()

    def _reduce(self, values: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
        try:
            self._wait()
            with phase("exchange"):
                dist.all_reduce(values, how)
        except RuntimeError as lost:
            raise RankError(f"{LOST}: {lost}") from lost


def full(values: Tensor) -> Tensor:
    """All of a sharded tensor, by all ranks together; any other as it is."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def restarted() -> bool:
    """Whether torchrun, under `--max-restarts`, has started the processes again after one has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def connected(timeout: float) -> Iterator[Ranks]:
    """The ranks of this run, by what torchrun says in the environment. On CUDA each rank has the device of its number.

    timeout: seconds that a rank waits for the others before it gives up; where another program, such as Ray, has
    connected the processes, that is up to it.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        yield ALONE
        return
    if dist.is_initialized():
        with _named_errors():
            yield ProcessGroup()
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
        with _named_errors():
            yield ProcessGroup()
    finally:
        dist.destroy_process_group()


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn what PyTorch raises for a lost connection, wherever it does, into a RankError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = RankError(f"{LOST}: {error}")
        for note in getattr(error, "__notes__", ()):
            lost.add_note(note)
        raise lost from error
