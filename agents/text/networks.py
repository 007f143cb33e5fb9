"""Actors and critics of text as TensorDictModules, each with its own weights.

The actor starts from the reference. The critic's backbone starts from the reward model where that reads the
same tokens, else from the reference. All read whole texts in one forward pass.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.objectives.distributions import Categorical
from textenv.masks.token_sets import TokenSets
from textenv.models.language_model import response_logits
from textenv.rewards.reward_model import RewardModel, reads_every_position
from textenv.state import position_ids
from textenv.task import Task

INPUTS: list[Any] = ["input_ids", "attention_mask", "mask"]
MASKS: list[Any] = ["allowed_ids", "allowed_inside"]  # in rollouts of tasks with action masks
FORBIDDEN = -1e4  # logit of a token that may not come: exp(-1e4) is 0 in float32, and nothing turns into NaN


class TextActor(nn.Module):
    """A causal language model's logits for all response tokens, at the sampling temperature."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        allowed_ids: Tensor | None = None,
        allowed_inside: Tensor | None = None,
    ) -> Tensor:
        """input_ids, attention_mask: [B, L]; mask: bool [B, R]. Returns float32 [B, R, V].

        allowed_ids: int32 [B, R, K] and allowed_inside: bool [B, R], a `TokenSets` of the tokens that the masks
        allowed while sampling, where there were masks; the others get no probability.

        Outside the response the actor is certain of id 0, the action stored there: log-probability, entropy and
        gradient of padding are exactly zero, whatever stands in it.
        """
        width = input_ids.shape[1] - mask.shape[1]  # P
        logits = response_logits(self.model, input_ids, attention_mask, width).float() / self.temperature
        if allowed_ids is not None and allowed_inside is not None:
            logits = forbid(logits, TokenSets(allowed_ids, allowed_inside))
        return certain_outside(logits, mask)

    def all_states(self, data: TensorDict) -> Tensor:
        """Logits at s_0..s_R, the last as in padding: the response is over there. Returns float32 [B, R + 1, V]."""
        return read_states(self.model, data, self.temperature)[0]


class TextQ(nn.Module):
    """Q(s, a) = V(s) + α log π(a|s): a language model is the policy, and a linear head on its last states is V.

    So the policy softmax(Q/α) is the one that the language model writes by, α log Σ exp(Q/α) is V, and a language
    model that is the reference makes a policy that is the reference.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, sampling: float, temperature: float) -> None:
        """sampling: the temperature that logits are divided by; temperature: α."""
        super().__init__()
        self.model, self.head, self.sampling, self.temperature = model, head, sampling, temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        allowed_ids: Tensor | None = None,
        allowed_inside: Tensor | None = None,
    ) -> Tensor:
        """Values of all tokens at every state before a response token, float32 [B, R, V]; see `TextActor`."""
        given = dict(zip(INPUTS, (input_ids, attention_mask, mask), strict=True))
        if allowed_ids is not None and allowed_inside is not None:
            given |= dict(zip(MASKS, (allowed_ids, allowed_inside), strict=True))
        return self.all_states(TensorDict(given, batch_size=[len(mask)]))[:, :-1]

    def all_states(self, data: TensorDict) -> Tensor:
        """Values at s_0..s_R, finite in padding too. Returns float32 [B, R + 1, V]."""
        logits, hidden = read_states(self.model, data, self.sampling)
        # The head reads and does not train what it reads: errors of V, large at first, would push the policy about.
        return self.head(hidden.detach()).float() + self.temperature * logits.log_softmax(-1)


def read_states(model: PreTrainedModel, data: TensorDict, temperature: float) -> tuple[Tensor, Tensor]:
    """A language model's logits at s_0..s_R, under the masks that were stored, and its last hidden states.

    Returns float32 [B, R + 1, V] and [B, R + 1, H].
    """
    input_ids, attention_mask, mask = (data[name] for name in INPUTS)
    states = mask.shape[1] + 1
    output: Any = model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        logits_to_keep=states,
        output_hidden_states=True,
        use_cache=False,
    )
    logits = output.logits.float() / temperature
    if "allowed_ids" in data:
        logits = torch.cat(
            [forbid(logits[:, :-1], TokenSets(data["allowed_ids"], data["allowed_inside"])), logits[:, -1:]], 1
        )
    return certain_outside(logits, nn.functional.pad(mask, (0, 1))), output.hidden_states[-1][:, -states:]


def forbid(logits: Tensor, allowed: TokenSets) -> Tensor:
    """Logits [B, R, V] that leave probability to a set of tokens at each position [B, R] alone."""
    return logits.masked_fill(~allowed.dense(logits.shape[-1]), FORBIDDEN)


def certain_outside(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, R, V] where the mask [B, R] is true; elsewhere such that id 0 has all probability."""
    certain = torch.zeros(logits.shape[-1], device=logits.device)
    certain[0] = -FORBIDDEN  # so log_softmax is exactly 0 at id 0
    return torch.where(mask[..., None], logits, certain)


class TextCritic(nn.Module):
    """A backbone and a linear head that gives every state s_0..s_T its value."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Values of the states before each response token. Returns float32 [B, R, 1]."""
        return self._values(input_ids, attention_mask, mask)[:, :-1]

    def all_states(self, data: TensorDict) -> Tensor:
        """Values of s_0..s_R, the state after the last token too. Returns float32 [B, R + 1, 1]."""
        return self._values(data["input_ids"], data["attention_mask"], data["mask"])

    def _values(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state[:, -mask.shape[1] - 1 :]  # [B, R + 1, H]: s_t is read at token t - 1
        return self.head(hidden).float()


def language_model_of(policy: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a text policy."""
    model: Any = policy.model
    return model


class TextNetworkFactory:
    """NetworkFactory for a task: see `agents.interfaces.NetworkFactory`."""

    discrete = True

    def __init__(self, task: Task, start: str = "auto", rows_per_pass: int = 16, seed: int = 0) -> None:
        self.task, self.start, self.rows_per_pass, self.seed = task, start, rows_per_pass, seed
        self.group = task.config.group_size
        self.temperature = task.config.kl_coef
        self.q_networks = 0  # made so far

    def actor(self) -> ProbabilisticTensorDictSequential:
        """A policy that starts as the reference."""
        return make_actor(self.task)

    def critic(self) -> TensorDictModule:
        """Values, from the start that was chosen."""
        return make_critic(self.task, self.start, self.seed)

    def q_network(self, temperature: float) -> TensorDictModule:
        """Values of tokens, whose policy starts as the reference; no two of them start alike."""
        self.q_networks += 1
        return make_q_network(self.task, temperature, self.seed + self.q_networks)

    @torch.no_grad()
    def all_states(self, network: Any, data: TensorDict) -> Tensor:
        """A network's outputs at s_0..s_R, [B, R + 1, ...]."""
        return torch.cat([network.all_states(part) for part in data.split(self.rows_per_pass)])


def make_actor(task: Task) -> ProbabilisticTensorDictSequential:
    """An actor that starts as the reference, in train mode and without dropout."""
    model = _trainable_copy(task.load_reference().model)
    modules: Any = (
        TensorDictModule(TextActor(model, task.config.temperature), INPUTS + (MASKS if task.masks else []), ["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=Categorical,
            return_log_prob=True,
        ),
    )
    return ProbabilisticTensorDictSequential(*modules)


def make_q_network(task: Task, temperature: float, seed: int) -> TensorDictModule:
    """Values of tokens at a temperature: a copy of the reference, and a small random head drawn from the seed."""
    if not temperature > 0:
        raise ValueError(
            f"values of tokens need a temperature above 0, got {temperature:g}: the policy that writes is "
            "softmax(Q / temperature). Give --env-arg kl_coef=0.1 or so, whose β it is then, or --temperature."
        )
    model = _trainable_copy(task.load_reference().model)
    head = _zero_head(model)
    with torch.no_grad():  # random, since two that start alike on the same rows would stay alike
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    network = TextQ(model, head, task.config.temperature, temperature)
    return TensorDictModule(network, INPUTS + (MASKS if task.masks else []), ["action_value"])


def make_critic(task: Task, start: str = "auto", seed: int = 0) -> TensorDictModule:
    """A critic that starts from the reward model, head included, or from another network with a zero head.

    start: `reward-model`, `reference`, `scratch` (the reference's architecture with random weights drawn from the
    seed), or `auto`: the reward model where it reads the same tokens, else the reference. Where scores are normalized
    the head is zero too, since it would begin in another unit than that of its targets.
    """
    reward, reference = task.reward, task.load_reference().model
    fits = isinstance(reward, RewardModel) and reward.tokenizer is None and reads_every_position(reward.model)
    if start == "reward-model" and not fits:
        raise ValueError(
            f"a critic cannot start from the reward {reward.name!r}: it is no reward model that reads the reference's "
            "own tokens. Choose --critic reference, or leave it out."
        )
    if start in ("auto", "reward-model") and fits:
        assert isinstance(reward, RewardModel)
        backbone = _trainable_copy(reward.model.base_model)
        head = _head(reward.model, reward.label) if task.normalizer is None else _zero_head(backbone)
    else:
        backbone = _trainable_copy(_random(reference, seed) if start == "scratch" else reference.base_model)
        head = _zero_head(backbone)
    return TensorDictModule(TextCritic(backbone, head), INPUTS, ["state_value"])


def _random(model: Any, seed: int) -> Any:
    """A backbone of the same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model.base_model)(model.config).to(model.device)


def _zero_head(backbone: Any) -> nn.Linear:
    head = nn.Linear(backbone.config.get_text_config().hidden_size, 1, device=backbone.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _head(model: PreTrainedModel, label: int | None) -> nn.Linear:
    """The reward model's own head as a value head, with a bias.

    The log-odds of one label of two are a difference of outputs, so linear too; those of more are not, and the
    label's own output less the mean of the others is the nearest that a linear head comes.
    """
    score: Any = model.score
    outputs = score.out_features
    mix = torch.ones(1, 1) if label is None else torch.full((1, outputs), -1.0 / (outputs - 1))
    if label is not None:
        mix[0, label] = 1.0
    mix = mix.to(score.weight)
    head = nn.Linear(score.in_features, 1, device=score.weight.device)
    with torch.no_grad():
        head.weight.copy_(mix @ score.weight)
        head.bias.zero_() if score.bias is None else head.bias.copy_(mix[0] @ score.bias)
    return head


def _trainable_copy(model: Any) -> Any:
    duplicate = copy.deepcopy(model).float().requires_grad_(True).train()
    # A live model that a user shared may have dropout, as modules or as plain numbers; ratios must start at 1.
    for module in duplicate.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)
    return duplicate
