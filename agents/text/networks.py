"""Actors, critics and Q-networks for text: plain modules around language models, each with its own weights.

The actor starts from the reference. The critic's backbone starts from the reward model if that reads the same tokens,
otherwise from the reference. All process whole texts in one forward pass. Batches are TensorDicts with `input_ids` and
`attention_mask` [B, L], `mask` bool [B, R] and, with action masks, `allowed_ids` int32 [B, R, K] and `allowed_inside`
bool [B, R]: a `TokenSets` of the tokens that were allowed while sampling.

A number for every token at every state does not fit in memory. So actors and Q-networks give `TokenValues`, which are
formed where they are read, at generated tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.objectives.actor_critic import Categorical
from agents.ranks import ALONE, Ranks
from agents.seeds import initial_weights, seed_of
from agents.text.config import FULL, TextConfig
from agents.text.lora import with_adapters
from agents.text.precision import Precision
from agents.text.sharding import add_twin, frozen_models, in_step, shard_network, whole
from textenv.masks.token_sets import TokenSets
from textenv.models.decoding import decodes_from_cache
from textenv.models.language_model import find_backbone, hidden_states, read, read_states
from textenv.models.logits import Logits, map_states, read_logits, spread
from textenv.models.probe import check_backbone
from textenv.rewards.reward_model import RewardEnsemble, RewardModel, linear_head, reads_every_position
from textenv.state import batches, own_settings
from textenv.task import Task

# Logit of a token without probability, below the largest of its row: exp(-1e4) is 0 in float32, and finite logits keep
# 0 · log 0 and its gradient free of NaN.
FORBIDDEN = -1e4

DEFAULTS = TextConfig()


@dataclass(frozen=True)
class TokenValues:
    """A number for every token at the states of generated tokens, not formed yet: a logit, or an action value."""

    logits: Logits  # of N states
    mask: Tensor  # bool [B, R], true at N generated tokens

    def map(self, function: Callable[..., Tensor], *others: TokenValues | Tensor) -> Tensor:
        """`function` of the numbers [n, V], some states at a time: see `textenv.models.logits.map_states`.

        others: what else it takes a part of: numbers of other networks at the same states, then tensors [B, R, ...].
        Returns [B, R, ...], exactly zero in value and gradient at tokens that are not generated.
        """
        places = self.mask.nonzero(as_tuple=True)
        logits = [each.logits for each in (self, *others) if isinstance(each, TokenValues)]
        states = [each[places] for each in others if isinstance(each, Tensor)]
        return spread(map_states(function, logits, *states), self.mask)


@dataclass(frozen=True)
class TokenDistribution:
    """A policy's distribution over tokens at every generated token; exactly zero elsewhere. See `Categorical`."""

    values: TokenValues  # logits

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of tokens. action: int64 [B, R]; returns [B, R]."""
        return -self.values.map(partial(nn.functional.cross_entropy, reduction="none"), action)

    def entropy(self) -> Tensor:
        """−Σ π log π in nats, [B, R]."""
        return self.values.map(lambda logits: Categorical(logits).entropy())


class TextActor(nn.Module):
    """A causal language model as a policy, at the sampling temperature."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def distribution(self, batch: TensorDict) -> TokenDistribution:
        """Distribution over tokens at every response position; tokens that were not allowed get no probability."""
        return TokenDistribution(self.all_states(batch))

    def all_states(self, batch: TensorDict) -> TokenValues:
        """Logits of all tokens."""
        return allowed_logits(self.model, batch, self.temperature)


class TextQ(nn.Module):
    """Q(s, a) = V(s) + α log π(a|s): a language model is the policy π, and a linear head on its last states is V.

    Then softmax(Q/α) is the language model's own distribution, α log Σ exp(Q/α) is V, and a network that starts as the
    reference has the reference as its policy.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, temperature: float, alpha: float) -> None:
        super().__init__()
        self.model, self.head, self.temperature, self.alpha = model, head, temperature, alpha

    def all_states(self, batch: TensorDict) -> TokenValues:
        """Values of all tokens."""
        policy = allowed_logits(self.model, batch, self.temperature)

        def head(hidden: Tensor, *sets: Tensor) -> Tensor:
            # Detached: the head's errors are large at first and would disturb the policy.
            value = in_float32(self.head, hidden.detach())  # [n, 1]
            return value + self.alpha * policy.logits.head(hidden, *sets).log_softmax(-1)

        return replace(policy, logits=replace(policy.logits, head=head))


def allowed_logits(model: PreTrainedModel, batch: TensorDict, temperature: float) -> TokenValues:
    """A language model's float32 logits at a temperature; tokens that the batch does not allow get no probability."""
    mask = batch["mask"]
    logits = read_logits(model, batch["input_ids"], batch["attention_mask"], mask)
    sets = tuple(batch[name][mask] for name in ("allowed_ids", "allowed_inside") if name in batch)

    def head(hidden: Tensor, *sets: Tensor) -> Tensor:
        formed = logits.head(hidden).float() / temperature  # [n, V]
        return forbid(formed, TokenSets(*sets)) if sets else formed

    return TokenValues(replace(logits, head=head, further=sets), mask)


def forbid(logits: Tensor, allowed: TokenSets) -> Tensor:
    """Logits [n, V] with all probability on the allowed tokens of each state [n]."""
    inside = allowed.dense(logits.shape[-1])  # [n, V]
    largest = logits.detach().masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)  # [n, 1], of the allowed ones
    return torch.where(inside, logits, largest + FORBIDDEN)


class TextCritic(nn.Module):
    """A backbone and a linear head: the value of every state s_0..s_T."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def values(self, batch: TensorDict) -> Tensor:
        """V(s_t) before each response token, float32 [B, R]."""
        return self.all_states(batch)[:, :-1]

    def all_states(self, batch: TensorDict) -> Tensor:
        """V(s_0)..V(s_R), float32 [B, R + 1]."""
        states = batch["mask"].shape[1] + 1
        prompt_width = batch["input_ids"].shape[1] - states + 1
        texts = read_states(batch["input_ids"], batch["attention_mask"], prompt_width, states)
        hidden = hidden_states(self.backbone, *texts)  # [B, R + 1, H]: s_t is read at token t - 1
        return in_float32(self.head, hidden)[..., 0]


def in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    """A linear head in float32, under autocast too: bfloat16 tells values apart by 0.4% only."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())


def body_of(network: TextActor | TextCritic | TextQ) -> PreTrainedModel:
    """The Hugging Face model of a network."""
    body: Any = network.backbone if isinstance(network, TextCritic) else network.model
    return body


def distribution_of(policy: Any, batch: TensorDict) -> TokenDistribution:
    """The distribution of a text policy, also of one that is a network of action values."""
    return TokenDistribution(allowed_logits(policy.model, batch, policy.temperature))


def language_model_of(policy: nn.Module) -> PreTrainedModel:
    """The Hugging Face model of a text policy."""
    model: Any = policy.model
    return model


class TextNetworkFactory:
    """Networks for a task: see `agents.interfaces.NetworkFactory`."""

    discrete = True

    def __init__(self, task: Task, config: TextConfig = DEFAULTS, seed: int = 0, ranks: Ranks = ALONE) -> None:
        """seed: of random weights."""
        self.task, self.config, self.seed, self.ranks = task, config, seed, ranks
        self.precision = Precision(config.precision, task.device)
        self.group_size = task.config.group_size
        self.alpha = task.config.kl_coef
        self.made = 0  # networks with random weights, built so far

    @own_settings(gradients=True)
    def actor(self) -> TextActor:
        """A policy that starts as the reference."""
        rank = self.config.lora_rank
        with whole(*frozen_models(self.task)):
            return self._prepared(make_actor(self.task, rank, self._next_seed() if rank else 0))

    @own_settings(gradients=True)
    def critic(self) -> TextCritic:
        """A critic with the chosen start."""
        with whole(*frozen_models(self.task)):
            return self._prepared(make_critic(self.task, self.config.critic, self._next_seed(), self.config.lora_rank))

    @own_settings(gradients=True)
    def q_network(self, alpha: float) -> TextQ:
        """Values of tokens; the policy starts as the reference, and every network has another random head."""
        with whole(*frozen_models(self.task)):
            return self._prepared(make_q_network(self.task, alpha, self._next_seed()))

    def shard(self, networks: Any) -> None:
        """With `shard="full"`: divide all networks among the ranks."""
        if self.config.shard != FULL:
            return
        mesh = self.ranks.mesh(self.task.device)
        add_twin(networks.policy, torch.bfloat16 if self.precision.half else torch.float32)
        targets = [target.network for target in networks.targets.values()]
        for network in (*networks.trained.values(), *targets):
            if isinstance(network, TextActor | TextCritic | TextQ):
                shard_network(network, body_of(network), mesh)

    def _next_seed(self) -> int:
        self.made += 1
        return seed_of(self.seed, "networks", self.made)

    def _prepared(self, network: Any) -> Any:
        if self.config.gradient_checkpointing:
            recompute_layers(body_of(network))
        return network

    @own_settings()
    def state_values(self, critic: TextCritic, data: TensorDict) -> Tensor:
        """V(s_0)..V(s_R) without gradient, [B, R + 1], `micro_batch_tokens` at a time; each rank reads its own rows."""
        every: Any = data.select("input_ids", "attention_mask", "mask")
        own, sharded = every[self.ranks.share(len(every))], self.config.shard == FULL

        def values() -> Tensor:
            found = torch.zeros(len(own), own["mask"].shape[1] + 1, device=own["mask"].device)
            tokens = self.config.micro_batch_tokens
            parts = batches(own["attention_mask"].sum(1), tokens) if len(own) else []
            for rows in in_step(parts, self.ranks) if sharded else parts:
                if rows is None:
                    self._values(critic, every[:1])
                else:
                    found[rows] = self._values(critic, own[rows])
            return found

        return torch.cat(self.ranks.each(values, in_step=sharded)).to(data["mask"].device)

    def _values(self, critic: TextCritic, rows: TensorDict) -> Tensor:
        """V(s_0)..V(s_R) of rows of like length, [b, R + 1], zero after the end of a response."""
        mask, attention = rows["mask"], rows["attention_mask"]
        width = attention.shape[1] - mask.shape[1]  # P
        length = attention[:, width:].sum(1)  # [b]
        unused = mask.shape[1] - int(length.max())
        texts = {"input_ids": rows["input_ids"], "attention_mask": attention, "mask": mask}
        used = {name: tensor[:, : tensor.shape[1] - unused] for name, tensor in texts.items()}
        with self.precision.autocast():
            values = critic.all_states(TensorDict(used, batch_size=rows.batch_size))
        states = torch.arange(mask.shape[1] + 1, device=mask.device)
        return nn.functional.pad(values, (0, unused)).where(states <= length[:, None], 0.0)

    def map_states(self, function: Callable[..., Tensor], values: Sequence[TokenValues], *others: Tensor) -> Tensor:
        """`function` of action values, some of the states at a time; 0 at s_R, where the response is over."""
        mapped = values[0].map(function, *values[1:], *others)  # [B, R, ...]
        return torch.cat([mapped, torch.zeros_like(mapped[:, :1])], 1)


def make_actor(task: Task, lora_rank: int = 0, seed: int = 0) -> TextActor:
    """An actor that starts as the reference: a copy of it, or adapters on it, which start from the seed."""
    reference, temperature = task.load_reference().model, task.config.temperature
    if lora_rank:
        actor = with_adapters(TextActor(reference, temperature), "model", lora_rank, seed)
    else:
        actor = TextActor(_trainable_copy(reference), temperature)
    decodes_from_cache(language_model_of(actor), task.width)  # found out now, and not in the first rollout
    return actor


def make_q_network(task: Task, alpha: float, seed: int) -> TextQ:
    """Token values for a policy softmax(Q/α): a copy of the reference, and a small random head from the seed."""
    if not alpha > 0:
        raise ValueError(
            f"values of tokens need alpha above 0, got {alpha:g}: the policy is softmax(Q / alpha). Give "
            "--env.kl-coef 0.1 or so, whose β it takes, or --alpha."
        )
    model = _trainable_copy(task.load_reference().model)
    head = _zero_head(_head_input(model, task.width), model.device)
    with torch.no_grad():  # random: two networks that start equal and see the same rows stay equal
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return TextQ(model, head, task.config.temperature, alpha)


def make_critic(task: Task, start: str = "auto", seed: int = 0, lora_rank: int = 0) -> TextCritic:
    """A critic that starts from the reward model with its head, or from another network with a zero head.

    start: `reward-model` (of an ensemble, the first), `reference`, `scratch` (the reference's architecture with random
    weights drawn from the seed), or `auto`: the reward model if it reads the same tokens, otherwise the reference. If
    scores are normalized the head is zero as well, since the reward model's has other units than the value targets.

    lora_rank: of adapters that are trained in place of the backbone, which then stays that of the reward model or the
    reference; 0: a copy is trained.
    """
    reward, reference = task.reward, task.load_reference().model
    scorer = reward.models[0] if isinstance(reward, RewardEnsemble) else reward
    fits = isinstance(scorer, RewardModel) and scorer.tokenizer is None and reads_every_position(scorer.model)
    if start == "reward-model" and not fits:
        raise ValueError(
            f"a critic cannot start from the reward {reward.name!r}: it is not a reward model for the reference's "
            "own tokens. Choose --critic reference, or leave it out."
        )
    if start in ("auto", "reward-model") and fits:
        assert isinstance(scorer, RewardModel)
        backbone = find_backbone(scorer.model)
    else:
        backbone = _random(reference, seed) if start == "scratch" else find_backbone(reference)
    backbone = backbone if lora_rank else _trainable_copy(backbone)
    width = check_backbone(backbone, "critic", task.width, task.vocabulary)
    if start in ("auto", "reward-model") and fits and task.normalizer is None:
        assert isinstance(reward, RewardModel | RewardEnsemble)
        critic = TextCritic(backbone, linear_head(reward))
    else:
        critic = TextCritic(backbone, _zero_head(width, backbone.device))
    return with_adapters(critic, "backbone", lora_rank, seed) if lora_rank else critic


def _random(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A randomly initialized backbone of the same architecture."""
    backbone = find_backbone(model)
    with initial_weights(seed):
        return type(backbone)(backbone.config).to(model.device)  # type: ignore[arg-type]


@torch.no_grad()
def _head_input(model: PreTrainedModel, width: int) -> int:
    """The width of the hidden states that a language model's head reads, by one forward."""
    ids = torch.zeros(1, min(width, 2), dtype=torch.long, device=model.device)
    return read(model, ids, torch.zeros_like(ids))[1].shape[-1]


def _zero_head(width: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def recompute_layers(model: nn.Module) -> None:
    """Gradient checkpointing: the backward pass computes each layer again, and memory keeps its input alone.

    Transformers' own switch would put the model into train mode, where dropout and router noise are drawn. Raises
    ValueError for an architecture without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        names = sorted({type(module).__name__ for module in model.modules() if isinstance(module, PreTrainedModel)})
        raise ValueError(
            f"Transformers cannot recompute the layers of {' and '.join(names)}; leave out gradient_checkpointing, and "
            "lower micro_batch_tokens to save memory."
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)  # of a method, so that copies of the model call their own


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():  # decoding, which may be compiled
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def _trainable_copy(model: Any) -> Any:
    """A float32 copy with gradients. It stays in eval mode, where no dropout, layer drop or router noise is drawn."""
    return copy.deepcopy(model).float().requires_grad_(True).eval()
