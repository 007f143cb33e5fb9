"""Builds the objects that a `TextGenConfig` names, and checks that they fit together before any episode runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.config import DTYPES, TextGenConfig
from textenv.masks.build import MaskContext, build_masks
from textenv.masks.masks import TokenMask
from textenv.models.language_model import LanguageModel
from textenv.models.loading import (
    check_room,
    load_causal_lm,
    load_config,
    load_stop_token_ids,
    load_tokenizer,
    refuse_adapters,
    unwrap,
)
from textenv.models.probe import check_causal
from textenv.prompts.samplers import PromptSampler, make_sampler
from textenv.prompts.sources import PromptRows, read_prompts
from textenv.prompts.tokenized import Prompts, PromptTokenizer, pad_token_id
from textenv.reviews.prompts import train_prompts
from textenv.reviews.weights import REWARD_MODEL, SUPERVISED
from textenv.rewards.base import Reward
from textenv.rewards.build import RewardContext, build_reward, built_parts, check_fields
from textenv.rewards.normalization import Normalizer, make_normalizer, paid_part_names
from textenv.state import own_settings
from textenv.unread import Unread, refuse_unread

EMBEDDED = "reviews"  # names a part of the embedded task
PARTS = ("reference", "reward", "prompts")  # of a task

# Cases of (settings, the parts of the reward) in which settings are not read.
UNREAD: tuple[Unread, ...] = (
    Unread(
        ("score_mean", "score_std"),
        lambda job: job[0].score_normalization != "fixed",
        "scores are normalized by them with score_normalization='fixed' alone; set it, or leave them out.",
    ),
    Unread(
        ("score_normalization", "score_mean", "score_std", "score_clip"),
        lambda job: job[1].pays_only_tokens,
        "it applies to the score at the end of a response, and this reward pays at its tokens alone; scale the "
        "function's own numbers instead.",
    ),
    Unread(
        ("reward_label",),
        lambda job: not job[1].with_label,
        "the reward is not a classifier with several labels that is loaded here; leave it out, or pass "
        "shared(RewardModel(model, label=...)).",
    ),
    Unread(
        ("reward_ensemble",),
        lambda job: not job[1].with_ensemble,
        "the reward is not an ensemble that is loaded here; leave it out, or pass shared(RewardEnsemble(models, "
        "combine=...)).",
    ),
    Unread(
        ("reward_timeout",),
        lambda job: not job[1].with_timeout,
        "it limits the calls of reward functions, and the reward has none; leave it out.",
    ),
    Unread(
        ("dtype",),
        lambda job: isinstance(unwrap(job[0].reference), LanguageModel) and not job[1].with_dtype,
        "the reference is a live model, which keeps its own dtype, and the reward loads no model; leave it out.",
    ),
    Unread(
        ("chat_template_kwargs",),
        lambda job: not job[0].chat,
        "they are variables of the chat template, which formats prompts with chat=True alone; set it, or leave them "
        "out.",
    ),
)


class ReferenceLoader:
    """The reference model of a task, read from disk once, at the first call that needs it."""

    def __init__(self, config: TextGenConfig, device: torch.device, loaded: LanguageModel | None) -> None:
        self.config, self.device, self.loaded = config, device, loaded

    @own_settings()
    def __call__(self) -> LanguageModel:
        """The reference. Every call returns the same object."""
        if self.loaded is None:
            self.loaded = _load_reference(self.config, self.device)
        check_causal(self.loaded.model, "reference", self.config.width)
        return self.loaded


@dataclass(frozen=True)
class Task:
    """A decision process, ready to run. The environments, the fast path and the learners share it."""

    config: TextGenConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # V
    stop_token_ids: tuple[int, ...]
    pad_token_id: int  # fills empty columns; it carries no meaning, since the attention mask marks the tokens
    reference: LanguageModel | None  # None where kl_coef is 0, except `with_reference`
    reward: Reward
    normalizer: Normalizer | None  # None where the score is paid as it is
    prompts: Prompts
    device: torch.device
    load_reference: ReferenceLoader  # the reference, also where kl_coef is 0 and the environment does not run it
    masks: tuple[TokenMask, ...] = ()  # a token is allowed if every mask allows it

    @property
    def width(self) -> int:
        """L, the width of an observation."""
        return self.config.width

    @property
    def score_part_names(self) -> tuple[str, ...]:
        """The keys of `score_parts`."""
        return paid_part_names(self.reward, self.normalizer)

    def without_normalization(self) -> Task:
        """The task with unnormalized scores, for comparisons: running statistics neither apply nor change."""
        return replace(self, normalizer=None)

    def with_reference(self) -> Task:
        """The task that reads the reference where β is 0 too, to measure the KL."""
        return replace(self, reference=self.load_reference())

    def with_frozen_statistics(self) -> Task:
        """The task with normalization frozen at its current statistics."""
        return self if self.normalizer is None else replace(self, normalizer=self.normalizer.with_frozen_statistics())

    @own_settings()
    def read_prompts(self, source: Any) -> Prompts:
        """Read and tokenize prompts from any source that the argument `prompts` takes.

        Raises ValueError for a prompt that is too long, or that lacks a field which the reward reads.
        """
        rows = read_prompts(source)
        check_fields(self.reward, rows.fields, rows.places)
        return _tokenize(rows, self.config, self.tokenizer, self.vocabulary).to(self.device)

    def prompt_sampler(self, prompts: Prompts, default: str) -> PromptSampler:
        """A sampler of these prompts: the strategy in the settings, or `default` if they name none."""
        strategy = self.config.prompt_sampling or default
        return make_sampler(strategy, len(prompts), prompts.fields.get("weight"), self.config.group_size)


@own_settings()
def build_task(config: TextGenConfig) -> Task:
    """Load models and prompts. Raises ValueError for settings that would fail later, or do nothing."""
    config = name_parts(config)
    rows = read_prompts(train_prompts if is_embedded(config.prompts) else config.prompts)
    make_sampler(config.prompt_sampling or "uniform", len(rows.prompts), rows.fields.get("weight"), 1)  # may raise
    source = unwrap(config.reference)
    live = isinstance(source, LanguageModel) and config.device == "auto"
    device = source.device if live else config.torch_device()
    if config.kl_coef > 0 or isinstance(source, LanguageModel):
        reference = _load_reference(config, device)
        tokenizer, vocabulary, stops = reference.tokenizer, reference.vocabulary, reference.stop_token_ids
    else:
        name = _reference_name(source)
        model_config, tokenizer = load_config(name), load_tokenizer(name)
        stops = _stops(name, config, tokenizer)
        vocabulary = model_config.get_text_config().vocab_size
        check_room("reference", model_config, config.width)
        reference = None
    _check_stop_token_ids(stops, vocabulary)
    embedded = {EMBEDDED: str(REWARD_MODEL)}
    reward = build_reward(config.reward, RewardContext(config, tokenizer, vocabulary, device, embedded))
    refuse_unread(UNREAD, vars(config), [vars(TextGenConfig())], (config, built_parts(config.reward, reward)))
    normalizer = make_normalizer(config)
    paid_part_names(reward, normalizer)  # raises for names that collide
    check_fields(reward, rows.fields, rows.places)
    load_reference = ReferenceLoader(config, device, reference)
    if config.kl_coef > 0:
        load_reference()  # and checked
    mask_context = MaskContext(tokenizer, stops, vocabulary, config.width, reference=lambda: load_reference().model)
    return Task(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        stop_token_ids=stops,
        pad_token_id=pad_token_id(tokenizer, vocabulary),
        reference=reference if config.kl_coef > 0 else None,
        reward=reward,
        normalizer=normalizer,
        prompts=_task_prompts(rows, config, tokenizer, vocabulary).to(device),
        device=device,
        load_reference=load_reference,
        masks=build_masks(config.action_mask, mask_context),
    )


def name_parts(config: TextGenConfig) -> TextGenConfig:
    """The settings with the embedded task's parts named, if none is set. Raises ValueError if some are set, not all.

    A part of the embedded task beside parts of the user's own is rarely meant: its reward model, for instance, would
    score any text as a product review.
    """
    missing = [name for name in PARTS if getattr(config, name) is None]
    if len(missing) == len(PARTS):
        return replace(config, **dict.fromkeys(PARTS, EMBEDDED))
    if missing:
        given, by_name = [name for name in PARTS if name not in missing], [f"{name}={EMBEDDED!r}" for name in missing]
        raise ValueError(
            f"a task of your own needs reference, reward and prompts, got {' and '.join(given)} alone; give "
            f"{' and '.join(missing)} too, or take the embedded task's by name: {', '.join(by_name)}."
        )
    return config


def is_embedded(part: Any) -> bool:
    """Whether the value of `reference`, `reward` or `prompts` names the embedded task's."""
    return isinstance(part, str) and part == EMBEDDED


def _task_prompts(
    rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Prompts:
    """Tokenize; an error says that the prompts are the embedded ones, if the reference is not."""
    try:
        return _tokenize(rows, config, tokenizer, vocabulary)
    except ValueError as error:
        if not is_embedded(config.prompts) or is_embedded(config.reference):
            raise
        raise ValueError(
            f"{error} These are the embedded task's prompts, prompts={EMBEDDED!r}; give your own with prompts=... "
            "(--env.prompts on the command line)."
        ) from error


def _tokenize(rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Prompts:
    tokenize = PromptTokenizer(
        tokenizer, vocabulary, config.max_prompt_tokens, config.chat, config.chat_template_kwargs or {}
    )
    return replace(tokenize(rows.prompts, rows.places), fields=rows.fields, entries=rows.prompts)


def named_models(config: TextGenConfig) -> tuple[Any, list[Any]]:
    """The reference, and all parts of the reward: folders and names of the hub or of functions, or live objects."""
    config = name_parts(config)
    source, reward = unwrap(config.reference), unwrap(config.reward)
    parts = [unwrap(name) for name in reward] if isinstance(reward, Mapping) else [reward]
    return (
        source if isinstance(source, LanguageModel) else _reference_name(source),
        [str(REWARD_MODEL) if is_embedded(part) else part for part in parts],
    )


def _reference_name(source: Any) -> str:
    if is_embedded(source):
        return str(SUPERVISED)
    if isinstance(source, str):
        return source
    if isinstance(source, PreTrainedModel):
        raise ValueError(
            f"reference is a {type(source).__name__} without its tokenizer; pass "
            "reference=textenv.shared(model, tokenizer)."
        )
    raise ValueError(
        f"reference must be a folder, a hub name or textenv.shared(model, tokenizer), got {type(source).__name__}."
    )


def _load_reference(config: TextGenConfig, device: torch.device) -> LanguageModel:
    source = unwrap(config.reference)
    if isinstance(source, LanguageModel):
        if source.model.training:
            raise ValueError(
                "the reference is in train mode, where dropout changes its output; call model.eval() first."
            )
        refuse_adapters("the reference", source.model)
        stops = source.stop_token_ids if config.stop_token_ids is None else tuple(config.stop_token_ids)
        reference = replace(source, stop_token_ids=stops)
    else:
        name = _reference_name(source)
        load_config(name)  # raises for what is no model, which a tokenizer would report in other words
        tokenizer = load_tokenizer(name)
        stops = _stops(name, config, tokenizer)
        reference = LanguageModel(load_causal_lm(name, device, DTYPES[config.dtype]), tokenizer, stops)
    check_room("reference", reference.model.config, config.width)
    return reference


def _stops(name: str, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids in the settings, else the model's own."""
    if config.stop_token_ids is None:
        return load_stop_token_ids(name, tokenizer)
    ids: Any = config.stop_token_ids
    return tuple(ids) if isinstance(ids, Sequence) else (ids,)


def _check_stop_token_ids(ids: Sequence[Any], vocabulary: int) -> None:
    if not ids:
        raise ValueError(
            "the reference has no end token, so a response could only end at its budget; pass stop_token_ids=[...], or "
            "set eos_token_id in its generation_config.json."
        )
    if not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise ValueError(f"stop_token_ids must be token ids, from 0 to {vocabulary - 1}, got {list(ids)}.")
