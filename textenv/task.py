"""Builds the objects that a `TextGenConfig` names, and checks that they fit together before any episode runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from textenv.config import DTYPES, TextGenConfig
from textenv.masks.build import MaskContext, build_masks
from textenv.masks.masks import TokenMask
from textenv.models.language_model import LanguageModel
from textenv.models.loading import check_room, load_causal_lm, load_config, load_tokenizer, unwrap
from textenv.prompts.samplers import PromptSampler, make_sampler
from textenv.prompts.sources import PromptRows, read_prompts
from textenv.prompts.tokenized import Prompts, pad_token_id, tokenize, tokenize_chats
from textenv.reviews.prompts import train_prompts
from textenv.reviews.weights import REWARD_MODEL, SUPERVISED
from textenv.rewards.base import Reward
from textenv.rewards.build import RewardContext, build_reward, check_fields
from textenv.rewards.normalization import Normalizer, make_normalizer, paid_part_names
from textenv.state import own_settings


class ReferenceLoader:
    """The reference model of a task, read from disk once, at the first call that needs it."""

    def __init__(self, config: TextGenConfig, device: torch.device, loaded: LanguageModel | None) -> None:
        self.config, self.device, self.loaded = config, device, loaded

    @own_settings()
    def __call__(self) -> LanguageModel:
        """The reference. Every call returns the same object."""
        if self.loaded is None:
            self.loaded = _load_reference(self.config, self.device)
        return self.loaded


@dataclass(frozen=True)
class Task:
    """A decision process, ready to run. The environments, the fast path and the learners share it."""

    config: TextGenConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # V
    stop_token_ids: tuple[int, ...]
    pad_token_id: int  # fills empty columns; it carries no meaning, since the attention mask marks the tokens
    reference: LanguageModel | None  # None where kl_coef is 0
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

    def with_frozen_statistics(self) -> Task:
        """The task with normalization frozen at its current statistics."""
        return self if self.normalizer is None else replace(self, normalizer=self.normalizer.with_frozen_statistics())

    @own_settings()
    def read_prompts(self, source: Any) -> Prompts:
        """Read and tokenize prompts from any source that the argument `prompts` takes.

        Raises ValueError for a prompt that is too long, or that lacks a field which the reward reads.
        """
        rows = read_prompts(source)
        check_fields(self.reward, rows.fields)
        return _tokenize(rows, self.config, self.tokenizer).to(self.device)

    def prompt_sampler(self, prompts: Prompts, default: str) -> PromptSampler:
        """A sampler of these prompts: the strategy in the settings, or `default` if they name none."""
        strategy = self.config.prompt_sampling or default
        return make_sampler(strategy, len(prompts), prompts.fields.get("weight"), self.config.group_size)


@own_settings()
def build_task(config: TextGenConfig) -> Task:
    """Load models and prompts. Raises ValueError for settings that would fail later."""
    rows = read_prompts(train_prompts if config.prompts is None else config.prompts)
    make_sampler(config.prompt_sampling or "uniform", len(rows.prompts), rows.fields.get("weight"), 1)  # may raise
    source = unwrap(config.reference)
    device = config.torch_device()
    if isinstance(source, LanguageModel) and config.device == "auto":
        device = source.device
    if config.kl_coef > 0 or isinstance(source, LanguageModel):
        reference = _load_reference(config, device)
        tokenizer, vocabulary, stops = reference.tokenizer, reference.vocabulary, reference.stop_token_ids
        check_room("reference", reference.model.config, config.width)
    else:
        name = _reference_name(source)
        tokenizer, model_config = load_tokenizer(name), load_config(name)
        stops = _stop_token_ids(name, config, tokenizer)
        vocabulary = model_config.get_text_config().vocab_size
        check_room("reference", model_config, config.width)
        reference = None
    _check_stop_token_ids(stops, vocabulary)
    default = (str(REWARD_MODEL), "reviews")
    reward = build_reward(config.reward, RewardContext(config, tokenizer, vocabulary, device, default))
    normalizer = make_normalizer(config)
    paid_part_names(reward, normalizer)  # raises for names that collide
    check_fields(reward, rows.fields)
    load_reference = ReferenceLoader(config, device, reference)
    mask_context = MaskContext(tokenizer, stops, vocabulary, reference=lambda: load_reference().model)
    return Task(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        stop_token_ids=stops,
        pad_token_id=pad_token_id(tokenizer),
        reference=reference if config.kl_coef > 0 else None,
        reward=reward,
        normalizer=normalizer,
        prompts=_task_prompts(rows, config, tokenizer).to(device),
        device=device,
        load_reference=load_reference,
        masks=build_masks(config.action_mask, mask_context),
    )


def _task_prompts(rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Tokenize; an error names the embedded prompts if the user set a reference and no prompts."""
    try:
        return _tokenize(rows, config, tokenizer)
    except ValueError as error:
        if config.prompts is not None or config.reference is None:
            raise
        raise ValueError(
            f"{error} These are the embedded task's prompts, because prompts was not set; set your own with "
            "prompts=... (--env-arg prompts=... on the command line)."
        ) from error


def _tokenize(rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    tokenize_rows = tokenize_chats if config.chat else tokenize
    return replace(tokenize_rows(rows.prompts, tokenizer, config.max_prompt_tokens, rows.places), fields=rows.fields)


def _reference_name(source: Any) -> str:
    if source is None:
        return str(SUPERVISED)
    if isinstance(source, str):
        return source
    raise ValueError(
        f"reference must be a folder, a hub name or textenv.shared(LanguageModel(...)), got {type(source).__name__}."
    )


def _load_reference(config: TextGenConfig, device: torch.device) -> LanguageModel:
    source = unwrap(config.reference)
    if isinstance(source, LanguageModel):
        if source.model.training:
            raise ValueError(
                "the reference is in train mode, where dropout changes its output; call model.eval() first."
            )
        stops = source.stop_token_ids if config.stop_token_ids is None else tuple(config.stop_token_ids)
        return replace(source, stop_token_ids=stops)
    name = _reference_name(source)
    tokenizer = load_tokenizer(name)
    stops = _stop_token_ids(name, config, tokenizer)
    return LanguageModel(load_causal_lm(name, device, DTYPES[config.dtype]), tokenizer, stops)


def _stop_token_ids(name: str, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids in the settings, else those of the generation config, the model config or the tokenizer."""
    if config.stop_token_ids is not None:
        ids: Any = config.stop_token_ids
    else:
        sources = (_generation_eos(name), load_config(name).get_text_config().eos_token_id, tokenizer.eos_token_id)
        ids = next((source for source in sources if source is not None), None)
    return tuple(ids) if isinstance(ids, Sequence) else (() if ids is None else (ids,))


def _generation_eos(name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # the model has no generation config
        return None


def _check_stop_token_ids(ids: Sequence[Any], vocabulary: int) -> None:
    if not ids:
        raise ValueError(
            "the reference has no end token, so a response could only end at its budget; pass stop_token_ids=[...], or "
            "set eos_token_id in its generation_config.json."
        )
    if not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise ValueError(f"stop_token_ids must be token ids, from 0 to {vocabulary - 1}, got {list(ids)}.")
