"""Sharded weights: each rank keeps an equal part of every weight, with its gradient and its optimizer state.

Trained networks are PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023), by layer: a training forward gathers one layer's
weights at a time, and a backward pass sums the gradients and shares them out. So all ranks do as many, together.

Responses and scores take each rank its own time. They read plain models, whose weights are there inside `whole` alone:
the frozen ones, and a twin of the policy. Between rollouts these take no memory.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.ranks import Ranks, full
from textenv.models.language_model import cast_weights
from textenv.models.logits import knows_head
from textenv.models.probe import Refusal
from textenv.rewards.base import Reward, WeightedSum
from textenv.rewards.reward_model import RewardEnsemble, RewardModel, reward_models
from textenv.task import ReferenceLoader, Task

T = TypeVar("T")
_parts: WeakKeyDictionary[nn.Module, Callable[[], Mapping[str, Tensor]]] = WeakKeyDictionary()  # of a plain model
_twins: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # of a sharded policy: its plain twin
_read: WeakSet[Any] = WeakSet()  # sharded models that have been forwarded in the present `in_step`


@contextmanager
def whole(*models: nn.Module) -> Iterator[None]:
    """Have all weights of frozen models and twins; any other model is left alone. All ranks enter it together."""
    opened = [model for model in dict.fromkeys(models) if model in _parts and _is_empty(model)]
    try:
        for model in opened:
            _gather(model)
        yield
    finally:
        for model in opened:
            _empty(model)


def twin_of(policy: nn.Module) -> PreTrainedModel | None:
    """The plain twin of a sharded policy's language model, to be opened by `whole`; None of any other policy."""
    return _plain(_twins[policy]) if policy in _twins else None


@torch.no_grad()
def whole_copy(policy: nn.Module) -> Any:
    """A float32 copy of a sharded policy's language model, by all ranks together; of one with adapters peft's model."""
    twin = _twins[policy]
    copied, parts = copy.deepcopy(twin), _parts[_plain(twin)]()
    for name, weight in _plain(copied).named_parameters():
        weight.data = full(parts[name]).to(torch.float32, copy=True)  # of one rank, all is its own part
    return copied


def shard_task(task: Task, mesh: DeviceMesh) -> Task:
    """The task with a reference and reward models of its own, whose weights are there inside `whole` alone.

    Models are shared with whoever else has loaded them in this process, so those of the given task stay as they are.
    """
    loaded = task.load_reference()
    reference = replace(loaded, model=_shard_frozen(loaded.model, mesh))
    with whole(reference.model):
        (load := ReferenceLoader(task.config, task.device, reference))()  # checks the new object, once
    penalized = None if task.reference is None else reference
    return replace(task, reference=penalized, load_reference=load, reward=_shard_reward(task.reward, mesh))


def frozen_models(task: Task) -> list[PreTrainedModel]:
    """The reference and the reward models, for `whole`."""
    return [task.load_reference().model, *(reward.model for reward in reward_models(task.reward))]


def shard_network(network: Any, model: Any, mesh: DeviceMesh) -> None:
    """Shard the language model or backbone of a network. The network's own small heads stay whole on every rank.

    Raises ValueError for an architecture that cannot be sharded.
    """
    head = model.get_output_embeddings()
    if head is not None and not knows_head(model):
        refuse = Refusal(model, "sharded model")
        raise refuse("its head cannot be read apart from its forward", "Leave --shard out, or use another model.")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into outputs
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # FSDP takes no others
    for layer in layers_of(model):
        _fully_shard(layer, mesh)
    _fully_shard(model, mesh)
    model.register_forward_pre_hook(lambda *_: _read.add(model))
    if head is not None:  # it is called outside of the model's forward too, and after a backward pass
        head.register_forward_pre_hook(lambda *_: model.unshard())
    if "peft_model" in vars(network):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        network.adapters = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in trained.items()})


def add_twin(policy: Any, dtype: torch.dtype) -> None:
    """Give a policy that will be sharded a plain twin, which writes responses in `dtype`; with adapters in its own."""
    adapted, model = vars(policy).get("peft_model"), policy.model
    twin: Any = cast_weights(_skeleton(model), dtype) if adapted is None else _skeleton(adapted)
    _parts[_plain(twin)] = lambda: dict(model.named_parameters())
    _twins[policy] = twin


def in_step(parts: Sequence[T], ranks: Ranks) -> Iterator[T | None]:
    """The parts that go through sharded networks one after another; then None, until all ranks have done as many.

    For None the caller forwards some row in vain. At the end, weights that are still gathered are dropped: after an
    optimizer step they would be old ones.
    """
    try:
        yield from [*parts, *[None] * (ranks.most(len(parts)) - len(parts))]
    finally:
        while _read:
            model = _read.pop()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            # Without a backward pass FSDP remembers every forward for ever. Older versions cannot be told to forget.
            getattr(model, "reset_iter_state", lambda: None)()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that have all their weights to themselves.

    Those that Transformers can recompute; of an architecture without such layers, its longest list of modules.
    """
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = max(lists, key=len, default=[])
    uses = _uses(model)
    own = [layer for layer in found if all(uses[each] == count for each, count in _uses(layer).items())]
    inner = {part for layer in own for part in layer.modules() if part is not layer}
    return [layer for layer in own if layer not in inner]


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """How often each weight is one of a module's."""
    return Counter(weight for part in module.modules() for weight in part._parameters.values() if weight is not None)


def _shard_reward(reward: Reward, mesh: DeviceMesh) -> Reward:
    if isinstance(reward, WeightedSum):
        return WeightedSum([(weight, _shard_reward(member, mesh)) for weight, member in reward.members])
    own: Any = copy.copy(reward)
    if isinstance(reward, RewardEnsemble):
        own.models = tuple(_shard_reward(member, mesh) for member in reward.models)
    elif isinstance(reward, RewardModel):
        own.model = _shard_frozen(reward.model, mesh)
    else:
        return reward
    return own


def _shard_frozen(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """A copy of a frozen model that keeps a part of each weight."""
    parts = {name: _part(weight.data, mesh) for name, weight in model.named_parameters()}
    copied: Any = _skeleton(model)
    _parts[copied] = lambda: parts
    return copied


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    sharded: Any = fully_shard(module, mesh=mesh)
    sharded.set_gradient_divide_factor(1.0)  # the ranks' gradients are parts of one sum
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _part(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a weight that all ranks have, in memory of its own."""
    return distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).clone() if weight.ndim else weight


def _plain(twin: Any) -> PreTrainedModel:
    return twin if isinstance(twin, PreTrainedModel) else twin.get_base_model()


def _skeleton(model: nn.Module) -> Any:
    """A frozen copy of a model without its weights."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().new_empty(0), requires_grad=False) for weight in model.parameters()
    }
    return copy.deepcopy(model, empty)  # deepcopy takes what is in its memo


def _is_empty(model: nn.Module) -> bool:
    return all(weight.numel() == 0 for weight in model.parameters())


@torch.no_grad()
def _gather(model: nn.Module) -> None:
    parts = _parts[model]()
    for name, weight in model.named_parameters():
        weight.data = full(parts[name]).to(weight.dtype)


def _empty(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data.new_empty(0)
