"""From what a user says of the reward to the reward: names, functions, models, objects, and sums of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.config import DTYPES, TextGenConfig
from textenv.models.loading import check_room, load_classifier, load_function, load_tokenizer, unwrap
from textenv.rewards.base import Reward, WeightedSum
from textenv.rewards.functions import FunctionReward
from textenv.rewards.metrics import METRIC_PREFIX, metric_function
from textenv.rewards.per_token import PerToken, TokenFunctionReward
from textenv.rewards.reward_model import RewardModel


@dataclass(frozen=True)
class RewardContext:
    """What a reward is built for."""

    config: TextGenConfig
    tokenizer: PreTrainedTokenizerBase  # the policy's
    vocabulary: int  # V
    device: torch.device
    default: tuple[str, str]  # folder and name of the reward model that None stands for


def build_reward(given: Any, context: RewardContext) -> Reward:
    """The reward that `given` stands for, as `TextGenConfig.reward` may be written. Raises ValueError."""
    given = unwrap(given)
    if given is None:
        folder, name = context.default
        return _load_reward_model(folder, context, name)
    if isinstance(given, Mapping):
        return _build_sum(given, context)
    if isinstance(given, str) and given.startswith(METRIC_PREFIX):
        return function_reward(metric_function(given), given, context)
    if isinstance(given, str) and ":" in given:
        return function_reward(load_function(given), given, context)
    if isinstance(given, str):
        return _load_reward_model(given, context, given)
    if isinstance(given, PreTrainedModel):
        given = RewardModel(given, label=context.config.reward_label)
    if isinstance(given, RewardModel):
        _check_model(given, context)
    if isinstance(given, Reward):
        return given
    if callable(given):
        return function_reward(given, _name_of(given), context)
    raise ValueError(
        "reward must be a folder or hub name of a reward model, 'module:function', 'evaluate:METRIC:KEY', a function "
        "f(prompts, responses) -> list of floats, {name: weight}, or an object that follows textenv.Reward, got "
        f"{type(given).__name__}."
    )


def function_reward(function: Callable[..., Any], name: str, context: RewardContext) -> Reward:
    """A Python function as a reward, whichever of the forms it has."""
    timeout = context.config.reward_timeout
    if isinstance(function, PerToken):
        return TokenFunctionReward(function, name, timeout=timeout)
    return FunctionReward(function, name, timeout=timeout)


def check_fields(reward: Reward, present: Collection[str]) -> None:
    """Raises ValueError that names the reward and the field, where the prompts lack one that a function needs."""
    if isinstance(reward, WeightedSum):
        for _, member in reward.members:
            check_fields(member, present)
    if isinstance(reward, FunctionReward | TokenFunctionReward):
        reward.fields.check(present, reward.name)


def _build_sum(given: Mapping[Any, Any], context: RewardContext) -> WeightedSum:
    if not given:
        raise ValueError("reward is an empty mapping; give at least one {name: weight}.")
    for name, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}.")
    return WeightedSum([(weight, build_reward(name, context)) for name, weight in given.items()])


def _check_model(reward: RewardModel, context: RewardContext) -> None:
    """Refuses a live model that would go wrong later."""
    if reward.model.training:
        raise ValueError("the reward model is in train mode, where dropout blurs it; call model.eval() first.")
    if reward.tokenizer is not None:
        return
    width = reward.model.config.get_text_config().vocab_size
    if width < context.vocabulary:
        raise ValueError(
            f"the reward model has {width} token ids and the reference {context.vocabulary}, so it does not read "
            "the same tokens; pass shared(RewardModel(model, tokenizer=...))."
        )
    check_room("reward model", reward.model.config, context.config.width)


def _load_reward_model(folder: str, context: RewardContext, name: str) -> RewardModel:
    config = context.config
    model = load_classifier(folder, context.device, DTYPES[config.dtype])
    own = load_tokenizer(folder)
    # Models of one family may pad the same vocabulary to other widths; an id must fit to be read as it is.
    fits = model.config.get_text_config().vocab_size >= context.vocabulary
    same = fits and own.get_vocab() == context.tokenizer.get_vocab()
    reward = RewardModel(model, tokenizer=None if same else own, label=config.reward_label, name=name)
    _check_model(reward, context)
    return reward


def _name_of(function: Any) -> str:
    """What a function that was handed over bare is called."""
    written = getattr(function, "function", function)  # under one of our decorators
    return getattr(written, "__name__", type(written).__name__)
