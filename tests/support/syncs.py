"""Counts what makes the host wait for a CUDA device, without having one."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that bring a number to the host, or whose result has a size that depends on numbers. `isin` and
# `multinomial` do so inside, in some cases.
OPERATIONS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique", "_unique2"),
    *("unique_consecutive", "unique_dim", "repeat_interleave", "bincount", "isin", "multinomial"),
}
# Functions that are no operation on a CPU: copies to the host, and copies of the host's numbers to the device.
FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.tensor, torch.as_tensor, torch.from_numpy}


class CountSyncs:
    """`with CountSyncs() as syncs: ...`, and then `syncs.names` and `syncs.names.total()`."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.stack = ExitStack()

    def __enter__(self) -> CountSyncs:
        self.stack.enter_context(_Operations(self.names))
        self.stack.enter_context(_Functions(self.names))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


class _Operations(TorchDispatchMode):
    def __init__(self, names: Counter[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in OPERATIONS:
            self.names[name] += 1
        elif name in ("index", "index_put", "index_put_"):
            self.names["index by a mask"] += any(each is not None and each.dtype == torch.bool for each in args[1])
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, names: Counter[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FUNCTIONS:
            self.names[func.__name__] += 1
        return func(*args, **(kwargs or {}))
