"""Low-rank adapters (LoRA, Hu et al. 2022): a network trains a few weights of its own over a trunk that stays frozen.

The trunk is the reference's, or the reward model's. The adapted model has modules of its own around the trunk's
tensors, so there is one trunk in memory, and its owner never sees an adapter. (With sharded weights, each network keeps
a part of a trunk of its own.) Nothing is switched on or off: not in other threads, and not where a backward pass
computes a layer again.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agents.ranks import Ranks
from agents.seeds import initial_weights
from agents.text.sharding import twin_of, whole_copy
from textenv.models.probe import Refusal

if TYPE_CHECKING:
    from peft import PeftModel

SCALE = 2  # alpha over rank, as is usual; under Adam another value is much like another learning rate
Network = TypeVar("Network", bound=nn.Module)


def with_adapters(network: Network, attribute: str, rank: int, seed: int) -> Network:
    """Let a network train adapters in place of the weights of the model that it has as `attribute`.

    Its `parameters()` and `state_dict()` then hold the adapters, float32, and its other modules, without the trunk.
    Until the first step the adapters add zeros, so the model's outputs stay what they are. seed: of their random half.
    """
    trunk: Any = getattr(network, attribute)
    adapted = _adapt(_with_own_modules(trunk), rank, seed)
    delattr(network, attribute)
    # Past `nn.Module.__setattr__`, which would register the trunk.
    vars(network).update({attribute: adapted.get_base_model(), "peft_model": adapted, "trunk": trunk})
    trained = _trained(adapted.get_base_model())
    network.adapters = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in trained.items()})
    return network


def merged_model(policy: nn.Module) -> PreTrainedModel:
    """The language model of a policy without adapters: a float32 copy with the adapters added to its weights.

    Of a policy that has none, its own model; of a sharded one a copy, by all ranks together.
    """
    model: Any = policy.model
    if twin_of(policy) is not None:
        return _merged(whole_copy(policy))
    if (adapted := _peft_model(policy)) is None:
        return model
    # From the trunk anew: a trained model may hold states with gradients, which cannot be copied.
    trunk = copy.deepcopy(vars(policy)["trunk"]).float().requires_grad_(False)
    config: Any = adapted.peft_config["default"]
    copied = _adapt(trunk, config.r, seed=0)
    copied.get_base_model().load_state_dict(_trained(model), strict=False)
    return _merged(copied)


def save_adapter(policy: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Write a policy's adapter as peft does, for `PeftModel.from_pretrained(base, folder)`; nothing if it has none.

    Called by all ranks, of which the first writes.
    """
    if (adapted := _peft_model(policy)) is not None:
        adapted = adapted if twin_of(policy) is None else whole_copy(policy)
        if ranks.first:
            adapted.save_pretrained(str(folder), save_embedding_layers=False)  # they are never trained


def _merged(model: Any) -> PreTrainedModel:
    """The model without adapters, which it adds to its weights; a model that has none as it is."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload().eval()


def _peft_model(network: nn.Module) -> PeftModel | None:
    return vars(network).get("peft_model")


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen model with modules of its own, and the tensors of `model`."""
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.detach(), False) for weight in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()  # deepcopy takes what is in its memo


def _adapt(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Add an adapter to every linear layer below the head.

    All layers, and not the attention's alone: adapters there learn less than whole weights, at any rank, and those of
    all layers learn as much (Schulman et al., "LoRA Without Regret", 2025). It also needs no table of architectures.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ValueError(
            f"lora_rank={rank} needs peft ({error}). Install it with: pip install 'textenv[lora]'"
        ) from error
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules="all-linear",
        # Routers of experts: some are linear layers that return several tensors.
        exclude_modules=[name for name, _ in model.named_modules() if name.endswith("router")] or None,
        task_type=None if model.get_output_embeddings() is None else TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    refuse = Refusal(model, "model with adapters")
    try:
        with initial_weights(seed), warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted: Any = get_peft_model(model, config).eval()
    except ValueError as error:
        raise refuse(
            f"peft has none for it ({error})", "Leave lora_rank out, or use a model of another architecture."
        ) from error
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        refuse.failing(lambda: model(input_ids=ids, use_cache=False))
    return adapted
