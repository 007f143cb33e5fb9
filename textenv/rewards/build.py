"""Build the reward from the `reward` setting: names, functions, models, objects, and weighted sums.

`gym.make("TextGen-v0", reward=...)` and `python -m agents train --env.reward ...` accept:

- "reviews": the reward model of the embedded task; None, where reference and prompts are None too.
- A folder or hub name: a sequence-classification model, with the policy's tokenizer or another one. With several
  labels, `reward_label` names the label whose log-odds are the score.
- An ensemble: a folder of such folders, member-0, member-1, ... (links will do), or a model with K heads, both as
  `python -m agents reward-model` writes them. `reward_ensemble` says how the members become one score.
- `"module:function"`: a Python function of prompts and responses, for instance `my_rewards:helpful`. functions.py lists
  the forms, library.py has ready-made functions.
- `"evaluate:METRIC:KEY"`: a metric of Hugging Face's `evaluate` (metrics.py).
- `{name: weight, ...}`: the weighted sum of several of the above. Each reports its own score, before the weight, in
  `info["score_parts"]` under its name.
- From Python only: a function, or a live object in `textenv.shared(...)`: a model, a `RewardModel`, or any object that
  follows `textenv.Reward`.

`reward_timeout` limits each call of a function, in seconds; the error names the reward that exceeds it.
`score_normalization` and `score_clip` change the score before it is paid (normalization.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.config import DTYPES, TextGenConfig
from textenv.models.language_model import position_limit
from textenv.models.loading import (
    check_room,
    load_classifier,
    load_function,
    load_tokenizer,
    refuse_adapters,
    unwrap,
)
from textenv.rewards.base import Reward, WeightedSum
from textenv.rewards.functions import FunctionReward
from textenv.rewards.metrics import METRIC_PREFIX, metric_function
from textenv.rewards.per_token import PerToken, TokenFunctionReward
from textenv.rewards.reward_model import RewardEnsemble, RewardModel, has_heads, member_name, reward_models


@dataclass(frozen=True)
class RewardContext:
    """The environment settings and models that building a reward needs."""

    config: TextGenConfig
    tokenizer: PreTrainedTokenizerBase  # the policy's
    vocabulary: int  # V
    device: torch.device
    embedded: Mapping[str, str]  # folders of the embedded task's reward models, by the names that settings use


def build_reward(reward: Any, context: RewardContext) -> Reward:
    """Build a reward from a value of `TextGenConfig.reward`. Raises ValueError for any other value."""
    reward = unwrap(reward)
    if isinstance(reward, Mapping):
        return _build_sum(reward, context)
    if isinstance(reward, str) and reward in context.embedded:
        return _load_reward(context.embedded[reward], context, reward)
    if isinstance(reward, str) and os.path.isdir(reward):  # a folder's name may have a colon
        return _load_reward(reward, context, reward)
    if isinstance(reward, str) and reward.startswith(METRIC_PREFIX):
        return function_reward(metric_function(reward), reward, context)
    if isinstance(reward, str) and ":" in reward:
        return function_reward(load_function(reward), reward, context)
    if isinstance(reward, str):
        return _load_reward(reward, context, reward)
    if isinstance(reward, PreTrainedModel):
        reward = _with_heads(reward, None, context, "reward_model")
    for model in reward_models(reward) if isinstance(reward, RewardModel | RewardEnsemble) else ():
        _check_model(model, context)
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        return function_reward(reward, _name_of(reward), context)
    raise ValueError(
        "reward must be a folder or hub name of a reward model, 'module:function', 'evaluate:METRIC:KEY', a function "
        "f(prompts, responses) -> list of floats, {name: weight}, or an object that follows textenv.Reward, got "
        f"{type(reward).__name__}."
    )


def function_reward(function: Callable[..., Any], name: str, context: RewardContext) -> Reward:
    """Wrap a Python function of any form as a reward."""
    timeout = context.config.reward_timeout
    if isinstance(function, PerToken):
        return TokenFunctionReward(function, name, timeout=timeout)
    return FunctionReward(function, name, timeout=timeout)


def check_fields(reward: Reward, present: Collection[str], places: Sequence[str] = ()) -> None:
    """Raise ValueError that names the reward and the field if the prompts' fields are not those that a function takes.

    present: the fields, which all prompts have; places: file and line of each prompt, empty if they are from no file.
    """
    if isinstance(reward, WeightedSum):
        for _, member in reward.members:
            check_fields(member, present, places)
    if isinstance(reward, FunctionReward | TokenFunctionReward):
        reward.fields.check(present, reward.name, f" ({places[0]})" if places else "")


@dataclass(frozen=True)
class BuiltParts:
    """What building a reward has read of the settings, and how it pays."""

    with_label: bool  # `reward_label` has chosen the score of a classifier
    with_ensemble: bool  # `reward_ensemble` has combined the scores of members
    with_timeout: bool  # `reward_timeout` limits a function
    with_dtype: bool  # a model was loaded in `dtype`
    pays_only_tokens: bool  # nothing is paid for the whole response


def built_parts(setting: Any, reward: Reward) -> BuiltParts:
    """What `build_reward` has read for this value of the setting, whose result was `reward`."""
    setting = unwrap(setting)
    members = [member for _, member in reward.members] if isinstance(reward, WeightedSum) else [reward]
    names = [unwrap(name) for name in setting] if isinstance(setting, Mapping) else [setting] * len(members)
    built = [member for name, member in zip(names, members, strict=True) if not isinstance(name, Reward)]
    loaded = [member for name, member in zip(names, members, strict=True) if isinstance(name, str)]
    return BuiltParts(
        with_label=any(map(_reads_label, built)),
        with_ensemble=any(isinstance(member, RewardEnsemble) for member in built),
        with_timeout=any(isinstance(member, FunctionReward | TokenFunctionReward) for member in built),
        with_dtype=any(isinstance(member, RewardModel | RewardEnsemble) for member in loaded),
        pays_only_tokens=all(isinstance(member, TokenFunctionReward) for member in members),
    )


def _build_sum(weights: Mapping[Any, Any], context: RewardContext) -> WeightedSum:
    if not weights:
        raise ValueError("reward is an empty mapping; give at least one {name: weight}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}.")
    members = [(weight, build_reward(name, context)) for name, weight in weights.items()]
    if len(ensembles := [member.name for _, member in members if isinstance(member, RewardEnsemble)]) > 1:
        raise ValueError(
            f"a sum takes one ensemble, since parts of the score have one disagreement, got {' and '.join(ensembles)}; "
            "give one of them as a function."
        )
    return WeightedSum(members)


def _check_model(reward: RewardModel, context: RewardContext) -> None:
    """Raise ValueError for a model that would score wrongly or fail later."""
    if reward.model.training:
        raise ValueError(
            "the reward model is in train mode, so dropout would make its scores random; call model.eval() first."
        )
    refuse_adapters(f"reward {reward.name!r}", reward.model)
    if reward.tokenizer is not None:
        reward.check(min(context.config.width, position_limit(reward.model) or context.config.width))
        return
    width = reward.model.config.get_text_config().vocab_size
    if width < context.vocabulary:
        raise ValueError(
            f"the reward model has {width} token ids and the reference {context.vocabulary}, so it cannot take "
            "the policy's tokens; pass shared(RewardModel(model, tokenizer=...))."
        )
    check_room("reward model", reward.model.config, context.config.width)
    reward.check(context.config.width)


def _reads_label(reward: Reward) -> bool:
    """Whether `reward_label` chose a score; that of an ensemble's heads is all of them."""
    if isinstance(reward, RewardEnsemble):
        return any(model.label is not None and not has_heads(model.model) for model in reward.models)
    return isinstance(reward, RewardModel) and reward.label is not None


def _load_reward(folder: str, context: RewardContext, name: str) -> RewardModel | RewardEnsemble:
    """The reward model of a folder or hub name, or the ensemble of the models in its folders member-0, member-1, ..."""
    names = [] if os.path.isfile(Path(folder, "config.json")) else member_folders(folder)
    if not names:
        return _load_reward_model(folder, context, name)
    members = [_load_reward_model(member, context, f"{name}/{Path(member).name}") for member in names]
    if nested := [member.name for member in members if isinstance(member, RewardEnsemble)]:
        raise ValueError(f"reward {name!r}: its member {nested[0]!r} has heads, an ensemble in itself; give one label.")
    return RewardEnsemble(members, combine=context.config.reward_ensemble, name=name)  # type: ignore[arg-type]


def member_folders(folder: str) -> list[str]:
    """The folders member-0, member-1, ... in a folder, in order; none if it is no ensemble.

    Raises ValueError if a number is missing, and while the ensemble is being trained.
    """
    if os.path.isfile(Path(folder, "training", "started_with.json")):  # see `textenv.training.loop`
        raise ValueError(f"the training of the reward models in {folder!r} has not ended; go on with it by --resume.")
    inside = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = sorted(int(name[7:]) for name in inside if re.fullmatch(r"member-(0|[1-9]\d*)", name))
    if numbers and (numbers != list(range(len(numbers))) or len(numbers) < 2):
        raise ValueError(
            f"{folder!r} holds the members {numbers} of an ensemble; give two or more, numbered from 0 without gaps."
        )
    return [os.path.join(folder, member_name(number)) for number in numbers]


def _load_reward_model(folder: str, context: RewardContext, name: str) -> RewardModel | RewardEnsemble:
    config = context.config
    model = load_classifier(folder, context.device, DTYPES[config.dtype])
    tokenizer = load_tokenizer(folder)
    # Models of one family may pad the same vocabulary to different widths. Every id of the policy must be an id here.
    fits = model.config.get_text_config().vocab_size >= context.vocabulary
    same = fits and tokenizer.get_vocab() == context.tokenizer.get_vocab()
    reward = _with_heads(model, None if same else tokenizer, context, name)
    for each in reward_models(reward):
        _check_model(each, context)
    return reward


def _with_heads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: RewardContext, name: str
) -> RewardModel | RewardEnsemble:
    """A model as a reward: with K heads as an ensemble, unless `reward_label` names one of them."""
    label = context.config.reward_label
    if label is not None or not has_heads(model):
        return RewardModel(model, tokenizer=tokenizer, label=label, name=name)
    heads = RewardModel(model, tokenizer=tokenizer, label=member_name(0), name=name)  # all of them are read
    return RewardEnsemble([heads], combine=context.config.reward_ensemble, name=name)


def _name_of(function: Any) -> str:
    """The name of a function that was passed directly, without its decorator."""
    undecorated = getattr(function, "function", function)
    return getattr(undecorated, "__name__", type(undecorated).__name__)
