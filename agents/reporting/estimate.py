"""What a run on text will need, before it is started: parameters, memory and disk, from the models' configurations.

Weights are counted on PyTorch's meta device, which holds none. A learner is built of such networks, so what it trains
and copies is its own affair. The rest are formulas:

- weights: the frozen models in the environment's dtype; trained networks and targets in float32, 4 bytes a parameter,
  with adapters (LoRA) the adapters alone. Where bf16 samples, a copy of the actor of 2 bytes a parameter.
- AdamW: 8 bytes a trained parameter. Gradients: 4 bytes, while an update lasts.
- activations: what the backward pass of one micro-batch reads, `ACTIVATIONS` numbers a token and layer, and logits a
  part at a time. With gradient checkpointing a layer keeps its input alone, and one layer is at work.
- a rollout: keys and values of all tokens of the responses that are written at a time, and their logits. Graphs
  (`compile` on CUDA) keep these keys and values all the time, and those of an evaluation's last, smaller batch.

The peak is that of an update or of a rollout, whichever is larger. What Python and the libraries hold, about 0.5 GB,
is not counted, nor what a reward function holds. With `shard="full"` every process keeps a part of weights and states,
and all weights of the frozen models and the policy during a rollout.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from agents.algorithms.registry import find_algorithm
from agents.config import BEST, TrainConfig
from agents.domains import TEXT, domain_of, entry_point_of, environment_settings
from agents.replay import free_memory
from agents.text.config import FULL, TextConfig
from agents.text.networks import TextActor, TextCritic, TextQ
from textenv.config import DTYPES, TextGenConfig
from textenv.env import TextGenEnv
from textenv.models.language_model import LanguageModel, find_backbone
from textenv.models.loading import load_config, quietly
from textenv.models.logits import PART
from textenv.rewards.build import member_folders
from textenv.rewards.metrics import METRIC_PREFIX
from textenv.rewards.reward_model import RewardEnsemble, RewardModel
from textenv.state import CPU_TOKENS, OTHER_TOKENS
from textenv.task import named_models

# Numbers that autograd keeps for each token in a layer, times the widths of hidden states and of the feed-forward part:
# inputs and outputs of norms, projections and attention; the gate, its activation and their product.
ACTIVATIONS = (16, 5)
FLOAT, HALF = 4, 2  # bytes
GB = 1e9


@dataclass(frozen=True)
class Item:
    """Something that takes room."""

    name: str
    bytes: int
    parameters: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What one process holds, and what the run's folder takes."""

    held: tuple[Item, ...]  # all the time
    update: tuple[Item, ...]  # at the peak of an update, beside it
    rollout: tuple[Item, ...]  # at the peak of a rollout, beside it
    disk: tuple[Item, ...]

    @property
    def memory(self) -> int:
        """Bytes at the peak of a process, beyond the libraries."""
        return _total(self.held) + max(_total(self.update), _total(self.rollout))

    @property
    def room(self) -> int:
        """Bytes of the run folder, at most."""
        return _total(self.disk)


def _total(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


class MetaNetworks:
    """Builds networks without weights: see `agents.interfaces.NetworkFactory`."""

    discrete = True

    def __init__(self, models: Models, settings: TextConfig, config: TextGenConfig) -> None:
        self.models, self.settings = models, settings
        self.alpha, self.group_size, self.temperature = config.kl_coef, config.group_size, config.temperature

    def actor(self) -> Any:
        """A policy."""
        return self._trained(TextActor(self.models.new_reference(), self.temperature), "model")

    def critic(self) -> Any:
        """A critic, of the reward model's size if there is one."""
        models = self.models
        reward = models.critic if self.settings.critic in ("auto", "reward-model") else None
        backbone: Any = find_backbone(models.new_reference() if reward is None else reward)
        width = backbone.config.get_text_config().hidden_size
        return self._trained(TextCritic(backbone, nn.Linear(width, 1, device="meta")), "backbone")

    def q_network(self, alpha: float) -> Any:
        """Action values."""
        model: Any = self.models.new_reference()
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device="meta")
        network = TextQ(model, head, self.temperature, alpha)
        network.register_buffer("epsilon", torch.zeros(()))
        return network

    def _trained(self, network: Any, attribute: str) -> Any:
        """The network, or with adapters what is trained of it."""
        if not (rank := self.settings.lora_rank):
            return network
        model = getattr(network, attribute)
        delattr(network, attribute)
        network.adapters = nn.Parameter(torch.empty(_adapters(model, rank), device="meta"))
        return network


def _adapters(model: Any, rank: int) -> int:
    """Parameters of adapters on every linear layer below the head."""
    head, total = model.get_output_embeddings(), 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            total += rank * sum(module.weight.shape)
    return total


@dataclass(frozen=True)
class Models:
    """The frozen models on the meta device, or live ones."""

    reference: Any
    rewards: list[Any]
    critic: Any = None  # the one that a critic may start from: of the only reward, the first of an ensemble; or None

    def new_reference(self) -> Any:
        """A language model like the reference."""
        return _on_meta(AutoModelForCausalLM, self.reference.config)


def read_models(config: TextGenConfig) -> Models:
    """The models that the settings of an environment name. Raises ValueError for names without a configuration."""
    source, rewards = named_models(config)
    live = isinstance(source, LanguageModel)
    reference = source.model if live else _on_meta(AutoModelForCausalLM, load_config(source))
    models = [_reward_models(each) for each in rewards]
    critic = models[0][0] if len(models) == 1 and models[0] else None
    return Models(reference, [model for some in models for model in some], critic)


def _reward_models(reward: Any) -> list[Any]:
    """The models of a reward: several of an ensemble; none of functions and metrics that is known."""
    if isinstance(reward, RewardEnsemble):
        return [model for member in reward.models for model in _reward_models(member)]
    if isinstance(reward, RewardModel | nn.Module):
        return [getattr(reward, "model", reward)]
    if not isinstance(reward, str):
        return []
    if not os.path.isdir(reward) and (reward.startswith(METRIC_PREFIX) or ":" in reward):
        return []
    whole = not os.path.isdir(reward) or os.path.isfile(Path(reward, "config.json"))
    folders = [reward] if whole else member_folders(reward) or [reward]
    return [_on_meta(AutoModelForSequenceClassification, load_config(folder)) for folder in folders]


def _on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"), quietly():
        return kind.from_config(config)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def estimate(
    train: TrainConfig, settings: TextConfig, algorithm: Any, config: TextGenConfig, ranks: int = 1
) -> Estimate:
    """What each of `ranks` processes of a run holds, and what its folder takes.

    config: the environment's settings. Raises ValueError for models that are not there.
    """
    models = read_models(config)
    learner: Any = find_algorithm(train.algorithm)[1](algorithm, MetaNetworks(models, settings, config))
    device = config.torch_device()
    cuda = device.type == "cuda"
    half = settings.precision == "bf16" or (settings.precision == "auto" and cuda)
    share = ranks if settings.shard == FULL else 1
    frozen = torch.empty((), dtype=DTYPES[config.dtype]).element_size()
    trained = {name: _count(network) for name, network in learner.networks.trained.items()}
    targets = sum(_count(network) for network in learner.networks.targets.values())
    weights, policy = sum(trained.values()), _count(models.reference)
    held = [Item("reference, frozen", policy * frozen // share, policy)]
    held += [Item("reward model, frozen", _count(model) * frozen // share, _count(model)) for model in models.rewards]
    held += [Item(f"{name}, trained", count * FLOAT // share, count) for name, count in trained.items()]
    held += [Item("target networks", targets * FLOAT // share, targets)] if targets else []
    held += [Item("AdamW's moments", 2 * weights * FLOAT // share)]
    if half and not settings.lora_rank and share == 1:
        held.append(Item("copy of the actor that samples", policy * HALF))
    replay = 0 if learner.on_policy else algorithm.buffer_size * _replay_row(config)
    held += [Item("replay buffer", replay)] if replay else []
    tokens = settings.micro_batch_tokens or (OTHER_TOKENS if cuda else CPU_TOKENS)
    tokens = min(tokens, -(-train.minibatch_size // ranks) * config.width)  # a minibatch may be less
    size = HALF if half else FLOAT
    update = [Item("gradients", weights * FLOAT // share), *_activations(models.reference, settings, tokens, size)]
    rollout = _rollout(models.reference, settings, config, ranks, size if half else frozen)
    if cuda and settings.compiles(device):
        held.append(rollout.pop(0))
        if rest := settings.evaluation_prompts % settings.rollout_size:
            evaluation = replace(settings, rollout_size=rest)
            held.append(_rollout(models.reference, evaluation, config, ranks, size if half else frozen)[0])
    if share > 1:
        gathered = policy * (frozen + size) + sum(_count(model) for model in models.rewards) * frozen
        rollout.append(Item("weights gathered for the rollout", gathered))
    checkpoint = 3 * weights * FLOAT + targets * FLOAT + replay
    kept = min(
        2 if train.keep_checkpoints == BEST else train.keep_checkpoints, train.iterations // train.checkpoint_every + 2
    )
    kept += train.keep_checkpoints != 1  # the last one is there twice
    disk = [Item("checkpoint", checkpoint * kept), Item("a new one while it is written", checkpoint)]
    disk.append(Item("actor/, at the end", policy * FLOAT))
    return Estimate(tuple(held), tuple(update), tuple(rollout), tuple(disk))


def _shape(model: Any) -> tuple[int, int, int, int, int]:
    """Layers, the widths of hidden states, feed-forward part, and keys, and the vocabulary; from the configuration."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    return config.num_hidden_layers, hidden, inner, keys, config.vocab_size


def _activations(model: Any, settings: TextConfig, tokens: int, size: int) -> list[Item]:
    layers, hidden, inner, _, vocabulary = _shape(model)
    layer = ACTIVATIONS[0] * hidden + ACTIVATIONS[1] * inner
    numbers = layers * hidden + layer if settings.gradient_checkpointing else layers * layer
    logits = 3 * min(tokens * vocabulary, PART) * FLOAT  # the part, its log-probabilities and their gradient
    return [Item("activations of a micro-batch", tokens * numbers * size), Item("logits, a part at a time", logits)]


def _rollout(model: Any, settings: TextConfig, config: TextGenConfig, ranks: int, size: int) -> list[Item]:
    layers, _, _, keys, vocabulary = _shape(model)
    rows = -(-settings.rollout_size // ranks)
    slots = min(settings.decode_slots or rows, rows)
    cache = slots * config.width * 2 * layers * keys * size
    return [Item("keys and values of responses", cache), Item("logits of a step", 3 * slots * vocabulary * FLOAT)]


def _replay_row(config: TextGenConfig) -> int:
    """Bytes of a stored response: ids and mask of a text; scores, log-probabilities and flags of its tokens."""
    return 9 * config.width + 24 * config.max_new_tokens


# ---- of a run, in words


def of_run(train: TrainConfig, settings: Any, algorithm: Any, ranks: int) -> Estimate:
    """What each process of a run needs. Raises ValueError where the settings alone do not say it."""
    if domain_of(train.env) is not TEXT:
        raise ValueError(f"what needs room are language models, and {train.env} has none; leave --estimate out.")
    kind = entry_point_of(train.env)
    if kind.__init__ is not TextGenEnv.__init__:
        raise ValueError(f"{train.env} chooses its models in {kind.__name__}.__init__, which only a run calls.")
    return estimate(train, settings, algorithm, environment_settings(train), ranks)


def start_lines(train: TrainConfig, settings: Any, algorithm: Any, ranks: int, folder: Path) -> list[str]:
    """What a run needs and what is free, for the terminal; nothing where that is not known."""
    try:
        needs = of_run(train, settings, algorithm, ranks)
    except Exception:  # not every architecture can be built without weights, and the run itself tells what is wrong
        return []
    memory, disk = free(train, folder)
    return [sentence(needs, memory, disk), *warnings(needs, memory, disk)]


def free(train: TrainConfig, folder: Path) -> tuple[int | None, int]:
    """Bytes of memory that are free for each process on the device, and of disk where the run's folder will be."""
    device = environment_settings(train).torch_device()
    memory, processes = free_memory(device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if memory is not None and device.type == "cpu":
        memory //= processes
    return memory, free_disk(folder)


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    place = folder.absolute()
    while not os.path.isdir(place):
        place = place.parent
    return shutil.disk_usage(place).free


def table(needs: Estimate, memory: int | None, disk: int) -> str:
    """All items, the sums, and what is free."""
    lines = [f"{'':34}{'parameters':>14}{'GB':>10}"]
    for title, items in (
        ("memory, all the time", needs.held),
        ("memory, in an update", needs.update),
        ("memory, in a rollout", needs.rollout),
        ("disk", needs.disk),
    ):
        lines.append(title)
        for item in items:
            count = "" if item.parameters is None else f"{item.parameters:,}"
            lines.append(f"  {item.name:32}{count:>14}{item.bytes / GB:>10.3f}")
    return "\n".join([*lines, sentence(needs, memory, disk)])


def sentence(needs: Estimate, memory: int | None, disk: int) -> str:
    """The sums, in a line."""
    free = "" if memory is None else f" ({memory / GB:.1f} free)"
    return (
        f"Needs about {needs.memory / GB:.2f} GB of memory{free} beside 0.5 of the libraries, and "
        f"{needs.room / GB:.2f} GB of disk ({disk / GB:.1f} free)."
    )


def warnings(needs: Estimate, memory: int | None, disk: int) -> list[str]:
    """A line for each of memory and disk that will not do, with the settings that lower it."""
    lines = []
    if memory is not None and needs.memory > memory:
        lines.append(
            "warning: that is more memory than is free. Less: --lora-rank 16 (no second set of weights, gradients and "
            "moments), --gradient-checkpointing, a smaller --micro-batch-tokens, --decode-slots, --env.dtype bfloat16, "
            "on CUDA --compile False, or several processes with --shard full."
        )
    if needs.room > disk:
        lines.append(
            "warning: that is more disk than is free. Make room, name another disk by --run, or --lora-rank 16."
        )
    return lines
