"""Actors, critics and Q-networks for text: plain modules around language models, each with its own weights.

The actor starts from the reference. The critic's backbone starts from the reward model if that reads the same tokens,
otherwise from the reference. All process whole texts in one forward pass. Batches are TensorDicts with `input_ids` and
`attention_mask` [B, L], `mask` bool [B, R] and, with action masks, `allowed_ids` int32 [B, R, K] and `allowed_inside`
bool [B, R]: a `TokenSets` of the tokens that were allowed while sampling.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.objectives.actor_critic import Categorical
from agents.seeds import seed_of
from agents.text.lora import with_adapters
from textenv.masks.token_sets import TokenSets
from textenv.models.decoding import decodes_from_cache
from textenv.models.language_model import find_backbone, hidden_states, read, read_states, response_logits
from textenv.models.probe import check_backbone
from textenv.rewards.reward_model import RewardModel, reads_every_position
from textenv.state import own_settings
from textenv.task import Task

# Logit of a token without probability, below the largest of its row: exp(-1e4) is 0 in float32, and finite logits keep
# 0 · log 0 and its gradient free of NaN.
FORBIDDEN = -1e4


class TextActor(nn.Module):
    """A causal language model as a policy, at the sampling temperature."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, batch: TensorDict) -> Tensor:
        """Logits of the response tokens, float32 [B, R, V]; tokens that were not allowed get no probability.

        Outside the mask the actor is certain of id 0, the action stored there: log-probability, entropy and gradient
        are exactly zero there, whatever the column holds.
        """
        input_ids, attention_mask, mask = batch["input_ids"], batch["attention_mask"], batch["mask"]
        width = input_ids.shape[1] - mask.shape[1]  # P
        logits = response_logits(self.model, input_ids, attention_mask, width).float() / self.temperature
        return certain_outside(_allowed_only(logits, batch), mask)

    def distribution(self, batch: TensorDict) -> Categorical:
        """Distribution over tokens at every response position, batch shape [B, R]."""
        return Categorical(self(batch))

    def all_states(self, batch: TensorDict) -> Tensor:
        """Logits at s_0..s_R, float32 [B, R + 1, V]; s_R is treated as padding, since the response is over."""
        return masked_states(self.model, batch, self.temperature)[0]


class TextQ(nn.Module):
    """Q(s, a) = V(s) + α log π(a|s): a language model is the policy π, and a linear head on its last states is V.

    Then softmax(Q/α) is the language model's own distribution, α log Σ exp(Q/α) is V, and a network that starts as the
    reference has the reference as its policy.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, temperature: float, alpha: float) -> None:
        super().__init__()
        self.model, self.head, self.temperature, self.alpha = model, head, temperature, alpha

    def all_states(self, batch: TensorDict) -> Tensor:
        """Values of all tokens at s_0..s_R, finite in padding too. Returns float32 [B, R + 1, V]."""
        logits, hidden = masked_states(self.model, batch, self.temperature)
        # Detached: the head's errors are large at first and would disturb the policy.
        return self.head(hidden.detach()).float() + self.alpha * logits.log_softmax(-1)


def masked_states(model: PreTrainedModel, batch: TensorDict, temperature: float) -> tuple[Tensor, Tensor]:
    """A language model's masked logits at s_0..s_R, and the hidden states that its head reads there.

    Returns float32 [B, R + 1, V], and [B, R + 1, H].
    """
    logits, hidden = read(model, *_read_batch(batch))
    logits = logits.float() / temperature
    if "allowed_ids" in batch:
        logits = torch.cat([_allowed_only(logits[:, :-1], batch), logits[:, -1:]], 1)
    return certain_outside(logits, nn.functional.pad(batch["mask"], (0, 1))), hidden


def _read_batch(batch: TensorDict) -> tuple[Tensor, Tensor]:
    """Left-aligned texts [B, T], and the positions of s_0..s_R in them [B, R + 1]."""
    states = batch["mask"].shape[1] + 1
    return read_states(batch["input_ids"], batch["attention_mask"], batch["input_ids"].shape[1] - states + 1, states)


def _allowed_only(logits: Tensor, batch: TensorDict) -> Tensor:
    """Logits [B, R, V] with the tokens that the batch does not allow made impossible."""
    if "allowed_ids" not in batch:
        return logits
    return forbid(logits, TokenSets(batch["allowed_ids"], batch["allowed_inside"]))


def forbid(logits: Tensor, allowed: TokenSets) -> Tensor:
    """Logits [B, R, V] with all probability on the allowed tokens of each position [B, R]."""
    inside = allowed.dense(logits.shape[-1])  # [B, R, V]
    largest = logits.detach().masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)  # [B, R, 1], of the allowed ones
    return torch.where(inside, logits, largest + FORBIDDEN)


def certain_outside(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, R, V] where the mask [B, R] is true; elsewhere all probability is on id 0."""
    certain = torch.zeros(logits.shape[-1], device=logits.device)
    certain[0] = -FORBIDDEN  # so log_softmax is exactly 0 at id 0
    return torch.where(mask[..., None], logits, certain)


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
        hidden = hidden_states(self.backbone, *_read_batch(batch))  # [B, R + 1, H]: s_t is read at token t - 1
        return self.head(hidden.float()).float()[..., 0]


def language_model_of(policy: nn.Module) -> PreTrainedModel:
    """The Hugging Face model of a text policy."""
    model: Any = policy.model
    return model


class TextNetworkFactory:
    """Networks for a task: see `agents.interfaces.NetworkFactory`."""

    discrete = True

    def __init__(
        self, task: Task, start: str = "auto", rows_per_pass: int = 16, seed: int = 0, lora_rank: int = 0
    ) -> None:
        """start: where critics start from, see `make_critic`; rows_per_pass: in `all_states`.

        lora_rank: of the adapters that actors and critics train in place of weights; 0: they train their weights.
        """
        self.task, self.start, self.rows_per_pass, self.seed = task, start, rows_per_pass, seed
        self.lora_rank = lora_rank
        self.group_size = task.config.group_size
        self.alpha = task.config.kl_coef
        self.made = 0  # networks with random weights, built so far

    @own_settings(gradients=True)
    def actor(self) -> TextActor:
        """A policy that starts as the reference."""
        return make_actor(self.task, self.lora_rank, self._next_seed() if self.lora_rank else 0)

    @own_settings(gradients=True)
    def critic(self) -> TextCritic:
        """A critic with the chosen start."""
        return make_critic(self.task, self.start, self._next_seed(), self.lora_rank)

    @own_settings(gradients=True)
    def q_network(self, alpha: float) -> TextQ:
        """Values of tokens; the policy starts as the reference, and every network has another random head."""
        return make_q_network(self.task, alpha, self._next_seed())

    def _next_seed(self) -> int:
        self.made += 1
        return seed_of(self.seed, "networks", self.made)

    @own_settings()
    def all_states(self, network: Any, data: TensorDict) -> Tensor:
        """`network.all_states`, `rows_per_pass` rows at a time. Returns [B, R + 1, ...]."""
        return torch.cat([network.all_states(part) for part in data.split(self.rows_per_pass)])


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
            f"values of tokens need alpha above 0, got {alpha:g}: the policy is softmax(Q / alpha). Give --env-arg "
            "kl_coef=0.1 or so, whose β it takes, or --alpha."
        )
    model = _trainable_copy(task.load_reference().model)
    head = _zero_head(_head_input(model, task.width), model.device)
    with torch.no_grad():  # random: two networks that start equal and see the same rows stay equal
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return TextQ(model, head, task.config.temperature, alpha)


def make_critic(task: Task, start: str = "auto", seed: int = 0, lora_rank: int = 0) -> TextCritic:
    """A critic that starts from the reward model with its head, or from another network with a zero head.

    start: `reward-model`, `reference`, `scratch` (the reference's architecture with random weights drawn from the
    seed), or `auto`: the reward model if it reads the same tokens, otherwise the reference. If scores are normalized
    the head is zero as well, since the reward model's has other units than the value targets.

    lora_rank: of adapters that are trained in place of the backbone, which then stays that of the reward model or the
    reference; 0: a copy is trained.
    """
    reward, reference = task.reward, task.load_reference().model
    fits = isinstance(reward, RewardModel) and reward.tokenizer is None and reads_every_position(reward.model)
    if start == "reward-model" and not fits:
        raise ValueError(
            f"a critic cannot start from the reward {reward.name!r}: it is not a reward model for the reference's "
            "own tokens. Choose --critic reference, or leave it out."
        )
    if start in ("auto", "reward-model") and fits:
        assert isinstance(reward, RewardModel)
        backbone = find_backbone(reward.model)
    else:
        backbone = _random(reference, seed) if start == "scratch" else find_backbone(reference)
    backbone = backbone if lora_rank else _trainable_copy(backbone)
    width = check_backbone(backbone, "critic", task.width, task.vocabulary)
    if start in ("auto", "reward-model") and isinstance(reward, RewardModel) and fits and task.normalizer is None:
        critic = TextCritic(backbone, _head(reward.model, reward.label))
    else:
        critic = TextCritic(backbone, _zero_head(width, backbone.device))
    return with_adapters(critic, "backbone", lora_rank, seed) if lora_rank else critic


def _random(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A randomly initialized backbone of the same architecture."""
    backbone = find_backbone(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def _head(model: PreTrainedModel, label: int | None) -> nn.Linear:
    """The reward model's head as a value head, with a bias.

    With two labels the log-odds of one are a difference of outputs, which is linear. With more they are not; the
    closest linear head is the label's output minus the mean of the others. A label that was trained by itself
    (`problem_type`) is its own output.
    """
    score: Any = model.score
    outputs = score.out_features
    alone = label is None or model.config.problem_type in ("multi_label_classification", "regression")
    mix = torch.zeros(1, outputs) if alone else torch.full((1, outputs), -1.0 / (outputs - 1))
    mix[0, label or 0] = 1.0
    mix = mix.to(score.weight)
    head = nn.Linear(score.in_features, 1, device=score.weight.device)
    with torch.no_grad():
        head.weight.copy_(mix @ score.weight)
        head.bias.zero_() if score.bias is None else head.bias.copy_(mix[0] @ score.bias)
    return head


def _trainable_copy(model: Any) -> Any:
    """A float32 copy with gradients. It stays in eval mode, where no dropout, layer drop or router noise is drawn."""
    return copy.deepcopy(model).float().requires_grad_(True).eval()
